"""tests/test_cuda.py under the emulation of CUDA; and the emulation finds planted faults."""

import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from test_latent_decode import ROWS, shuffle
from test_model import make_batch

import latent_decode
from common.shared_prefix import DecodingCache
from latent_decode import CapturedStep, generate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EMULATED = sys.modules.get("tests.emulated")
inside = pytest.mark.skipif(not EMULATED, reason="needs -p tests.emulated")


@pytest.mark.slow
def test_cuda_under_the_emulation():
    """Breaks if a step, a training or a captured graph would fail on CUDA for its devices or
    dtypes, or if the emulation does not find a fault below.
    """
    if importlib.metadata.version("torch") != "2.13.0+cpu" or not shutil.which("g++"):
        pytest.skip("the emulation needs a build of torch 2.13.0 without CUDA, and g++")
    command = [sys.executable, "-m", "pytest", "-p", "tests.emulated", "-q", "-rs", "-m", "cuda"]
    command += ["tests/test_cuda.py", "tests/test_emulated.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stdout[-6000:]
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", run.stdout, re.M)
    known = ("needs kernels", "could not import 'flash_attn'")
    assert all(reason.startswith(known) for reason in skipped), skipped
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 40


# -------------------------------------------------------------------------------- under it: faults


def refused(match):
    return pytest.raises(EMULATED.Refused, match=match)


@inside
@pytest.mark.cuda
def test_what_cuda_refuses_is_refused():
    """Breaks if tensors of two devices or dtypes meet unseen, or a copy is taken for a mistake."""
    x, y = torch.randn(3, 3), torch.randn(3, 3, device="cuda")
    for mistake in (lambda: x @ y, lambda: y + x, lambda: y.index_select(0, torch.tensor([1]))):
        with refused(MIXED):
            mistake()
    for mistake in (
        lambda: y @ y.bfloat16(),
        lambda: y.index_copy(0, torch.tensor([1], device="cuda"), y[:1].bfloat16()),
        lambda: torch.nn.functional.layer_norm(y.bfloat16(), (3,), y[0], y[0]),
    ):
        with pytest.raises(RuntimeError, match="dtype"):
            mistake()
    with refused("generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    assert torch.equal((y + x.cuda()).cpu(), y.cpu() + x) and y[torch.tensor([1])].is_cuda
    assert torch.equal((y * torch.tensor(2.0)).cpu(), 2 * y.cpu())
    with torch.autocast("cuda", torch.bfloat16):
        product = y @ y
    assert product.dtype == torch.bfloat16 and y.tolist() == y.cpu().tolist()


@inside
@pytest.mark.cuda
def test_a_graph_is_recorded_and_replayed():
    """Breaks if a capture computes, or a replay reads or writes other places than the recording."""
    x, total = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 3 * x.view(1, 2)
        total.add_(y[0])
    assert y.isnan().all() and total.tolist() == [0, 0]
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [[3 * value] * 2]
    assert total.tolist() == [9, 9]
    with pytest.raises(EMULATED.Refused, match="waits"), torch.cuda.graph(graph):
        x.sum().item()
    with pytest.raises(EMULATED.Refused, match="copy from the CPU"), torch.cuda.graph(graph):
        torch.tensor([1.0], device="cuda")
    assert not torch.cuda.is_current_stream_capturing()


def plant(monkeypatch, owner, name, old, new):
    """Edit the text of a function of the project."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} has changed: plant the fault elsewhere"
    edited = {}
    exec(source.replace(old, new), vars(inspect.getmodule(function)), edited)
    monkeypatch.setattr(owner, name, edited[name])


def decoded(model, batch, graph):
    settings = dict(max_new_tokens=40, n=2, temperature=1.0, top_p=0.9, cuda_graph=graph)
    return generate(model, batch, generator=torch.Generator().manual_seed(1), **settings)


MIXED = "on the GPU and on the CPU"
CLONED = "State(*(x.clone() for x in self.after)), Record(*(x.clone() for x in self.record))"


@inside
@pytest.mark.cuda
@pytest.mark.parametrize(
    "owner, name, old, new, error",
    [
        # a CPU tensor in a product
        (DecodingCache, "products", "(q, own_keys", "(q, torch.zeros(own_keys.shape)", MIXED),
        # bf16 times fp32
        (DecodingCache, "products", "(q, own_keys", "(q.bfloat16(), own_keys", "dtype"),
        # the host looks at the device inside the step
        (latent_decode, "choose", "word = ", "count.sum().item(); word = ", "waits for the GPU"),
        # what a replay gives is overwritten by the next
        (CapturedStep, "__call__", CLONED, "self.after, self.record", None),
        # the cache has grown, and the graph still writes to where it was
        (CapturedStep, "__call__", "len(u), self.cache.room", "len(u), 0", "out of bounds"),
    ],
)
def test_a_planted_fault_is_found(owner, name, old, new, error, model, tokenizer, monkeypatch):
    """Breaks if the fault is neither refused nor seen in what is decoded."""
    model = shuffle(model, seed=0).to("cuda")
    batch = {k: v.to("cuda") for k, v in make_batch(tokenizer, ROWS, "left").items()}
    good = decoded(model, batch, graph=True)
    assert torch.equal(good.tokens, decoded(model, batch, graph=False).tokens)
    plant(monkeypatch, owner, name, old, new)
    if error:
        with pytest.raises((RuntimeError, IndexError), match=error):
            decoded(model, batch, graph=True)
    else:
        assert not torch.equal(good.tokens, decoded(model, batch, graph=True).tokens)
