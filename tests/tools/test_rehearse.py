"""The rehearsal on fake tensors, against real tensors and against counts by hand."""

import json

import pytest
import torch

from model import FusedRMSNorm
from sft import sft_loss
from tests.conftest import run_python
from tools import rehearse, shapes
from tools.bench import checkpoint_activations, peak_of
from tools.pretended import PretendedGPU

TINY = dict(shape="tiny", images=1, words=20, n=2, new_tokens=16, sft_tokens=400, adjoint_terms=1)

# six layers that weigh about as much as the head: whoever forgets either is found out
SMALL = shapes.Shape(
    dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8),
    shapes.SHAPES["tiny"].vision | dict(out_hidden_size=256),
    tied=True,
)


def rehearsed(config):
    """A Rehearsal on CPU tensors, as it is without a compiler."""
    return rehearse.Rehearsal(config, PretendedGPU("cpu"))


def norm_in_parts(norm, x):
    """Rehearsed as the one kernel that it is on CUDA, which keeps less than its parts on a CPU."""
    x = x.to(torch.promote_types(x.dtype, norm.weight.dtype))
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


@pytest.mark.slow
@pytest.mark.parametrize("words", [800, 1100])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rehearsed_peak_is_what_is_measured(words, checkpointing, monkeypatch):
    """Breaks if an activation, a copy or a gradient is not in the ledger, or is not taken out."""
    monkeypatch.setitem(shapes.SHAPES, "small", SMALL)
    monkeypatch.setattr(FusedRMSNorm, "forward", norm_in_parts)
    config = rehearse.Config(shape="small", images=1, words=words, sft_tokens=1400)
    with (gpu := PretendedGPU("cpu")):
        fake = rehearse.Rehearsal(config, gpu)
        checkpoint_activations(fake.model, checkpointing)
        fake.case("SFT", fake.sft)
    parts = fake.cases["SFT"]["parts"]
    passing = sum(parts.values()) - sum(parts[k] for k in ("weights", "gradients", "moments"))

    model = shapes.make("small").train()
    model.model.visual.requires_grad_(False)
    checkpoint_activations(model, checkpointing)
    batch = shapes.sft_sample(config, "cpu")
    frames = batch.pop("future_pixel_values"), batch.pop("future_grid_thw")

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            sft_loss(model, latents=model.encode_frames(*frames), **batch)["loss"].backward()

    step()  # from now on there are gradients
    assert passing == pytest.approx(peak_of(step), rel=0.15)


def test_flops_are_counted_as_by_hand():
    """Breaks if a product is missing, counted twice, or in the wrong size."""
    T, words = 40, 9
    with PretendedGPU("cpu") as gpu:
        fake = rehearse.Rehearsal(rehearse.Config(**TINY), gpu)
        ids = torch.ones(1, T, dtype=torch.long)
        gpu.begin()
        fake.train_on(
            lambda model: model.logits(model.hidden(ids)[0][0, :words]).logsumexp(-1).sum()
        )
        flops = gpu.flops
    model = shapes.make("tiny", device="meta")
    layers = model.model.language_model.layers
    matrices = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    queries = layers[0].self_attn.q_proj.out_features
    # a weight: 2 FLOPs a token forward, 4 backward; attention: 2 products forward, 5 backward
    in_products = 6 * (matrices * T + model.lm_head.weight.numel() * words)
    assert flops == in_products + 7 * 2 * len(layers) * queries * T**2


def test_flops_of_experts():
    """Breaks if a token is counted at each expert, or a gradient of the experts is left out."""
    with PretendedGPU("cpu") as gpu:
        x, w = (torch.randn(*size).bfloat16().requires_grad_() for size in ((24, 16), (4, 16, 32)))
        ends = torch.tensor([6, 12, 18, 24], dtype=torch.int32)
        torch.nn.functional.grouped_mm(x, w, offs=ends).square().sum().backward()
        assert gpu.flops == 3 * 2 * 24 * 16 * 32


@pytest.mark.slow
def test_a_mixture_of_experts(monkeypatch):
    """Breaks if fake tensors do not run the experts, or a mixture is rehearsed in fp32."""
    text = shapes.SHAPES["tiny"].text | dict(num_experts=8, num_experts_per_tok=2)
    mixture = shapes.SHAPES["tiny"]._replace(text=text | dict(moe_intermediate_size=48))
    monkeypatch.setitem(shapes.SHAPES, "30b-a3b", mixture)
    settings = TINY | dict(shape="30b-a3b")
    cases = rehearse.main(rehearse.Config(**settings, lora_rank=4))
    assert len(cases) == 8 and all(case["flops"] > 0 for case in cases.values())
    with pytest.raises(ValueError, match="500 GB"):
        rehearse.Config(**settings)


def test_numbers_that_decide_are_known():
    """Breaks if a length, a mask or a count is not what it is with real tensors, if a number that
    nobody knows is not 0, or if the host waits without being counted.
    """
    with PretendedGPU("cpu") as gpu:
        ids = torch.tensor([[5, 7, 7, 0]])
        mask = ids == 7
        assert int(mask.sum()) == 2 and ids[mask].tolist() == [7, 7]
        assert torch.randn(4, 8)[mask[0]].shape == (2, 8)
        assert torch.randn(3).sum().item() == 0.0
        assert sum(gpu.looks.values()) == 5
        assert all("test_rehearse.py:" in place for place in gpu.looks)
        with pytest.raises(TypeError, match="aten.mm of .*bfloat16.*test_rehearse.py"):
            torch.mm(torch.randn(2, 2), torch.randn(2, 2).bfloat16())
    assert torch.tensor([1]).tolist() == [1]  # all is as it was


def test_a_ledger_of_live_bytes():
    """Breaks if what was freed counts at the peak, or what is there at the same time does not."""
    with PretendedGPU("cpu") as gpu:
        first = torch.randn(1000, 1000)
        second = first + 1
        del first
        third = second + 1
        storage = third.untyped_storage()
        storage.resize_(0)  # as FSDP frees
        gpu.kind = "more"
        fourth = torch.randn(2000, 500)
        assert gpu.ledger.peak() == dict(activations=2 * 4_000_256)
        del second
        assert gpu.ledger.peak(len(gpu.ledger.events)) == dict(more=fourth.nbytes + 256)


def test_the_smallest_card():
    """Breaks if a card is named of which less than a tenth stays free."""
    assert rehearse.smallest_card(0.9 * 80e9) == 80 and rehearse.smallest_card(0.91 * 80e9) == 141
    assert rehearse.smallest_card(140e9) is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--lora_rank", "4"], ["--shard", "--gpus", "2"]])
def test_the_command(layout, tmp_path):
    """Breaks if a case does not run, or a layout's weights are not what each GPU holds of them."""
    out = tmp_path / "rehearsed.json"
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    run_python(["-m", "tools.rehearse", *flags, *layout, f"--out={out}"])
    cases, model = json.loads(out.read_text())["cases"], shapes.make("tiny", device="meta")
    weights, head = sum(p.numel() for p in model.parameters()), model.lm_head.weight.numel()
    a_weight = 2 if layout else 4
    # of a frozen model, embeddings stay in fp32, and the output layer is a copy in bf16
    more = 2 * head + 2 * head if "--lora_rank" in layout else 0
    for name, case in cases.items():
        assert case["flops"] > 0 and case["card"] == 24, name
        assert case["parts"]["weights"] == pytest.approx(a_weight * weights + more, rel=0.1), name
    assert ("LA-DAPO, 1 terms through the latents" in cases) == ("--shard" not in layout)
    assert ("kernels" in cases["SFT"]) == (rehearse.HAS_CUDA or not layout[:1] == ["--shard"])
    # made on the GPU, the indices of pictures and rows alone would be waited for 40 to 90 times
    assert all(sum(case.get("waits", {}).values()) <= 30 for case in cases.values())
