# make demo: the whole pipeline on the embedded world. make test: the tests. Both set up .venv first.
PYTHON ?= python3
.PHONY: demo test

demo: .venv/ready
	.venv/bin/python toy.py

test: .venv/ready
	.venv/bin/python -m pytest -q

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready
