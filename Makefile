# make taste: a tiny trained model answers one question. make demo: the whole pipeline on the embedded
# world. make test: the tests. Each sets up .venv first.
# TORCH_INDEX: a package index to take torch from, such as PyTorch's own of CPU builds (README).
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
.PHONY: taste demo test test-slow mutations gpu gpus lint

taste: .venv/ready
	CUDA_VISIBLE_DEVICES= .venv/bin/python sample.py

demo: .venv/ready
	PATH="$$PWD/.venv/bin:$$PATH" bash toy/demo.sh

test: .venv/ready
	.venv/bin/python -m pytest -q -n 2 -m "not slow"

test-slow: .venv/ready
	.venv/bin/python -m pytest -q -m slow

# small wrong edits, each of which a test must catch (tests/mutations.py); about 20 minutes
mutations: .venv/ready
	.venv/bin/python -m tests.mutations

# one GPU of 80 GB, at most 9 minutes in all; a failed test does not keep the bench from running
gpu: .venv/ready
	@began=$$(date +%s); .venv/bin/python -m pytest -q -m cuda; tests=$$?; \
	.venv/bin/python -m tools.bench --minutes 8 --began $$began --out bench.json && exit $$tests

# two GPUs: SFT and LA-DAPO by NCCL, with DDP, --shard and --lora_rank, killed and resumed
gpus: .venv/ready
	.venv/bin/python -m pytest -q -m "slow or cuda" tests/common/test_machine.py

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
ifdef TORCH_INDEX
	$(PIP) --no-deps --index-url $(TORCH_INDEX) $(shell grep ^torch== requirements.txt)
endif
	$(PIP) -r requirements.txt
	touch .venv/ready
