"""bf16 arithmetic as on CUDA, by autocast on a CPU: which numbers have to be equal to the bit."""

import itertools
import types

import pytest
import torch
from test_la_dapo import sampled
from test_lora import tied
from test_model import save
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRMSNorm

import la_dapo
import latent_decode
from common.machine import Machine
from common.run import Run
from latent_decode import decisions, generate, token_logprobs
from model import FusedRMSNorm


@pytest.fixture
def machine():
    """A CPU that computes as CUDA does by default."""
    machine = Machine()
    machine.bf16 = True
    return machine


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def policy(request, model, tokenizer, machine, tmp_path):
    """-> a policy in fp32, prompts and a rollout of it, its folder."""
    model = tied(model) if request.param else model
    batch, rollout = sampled(model, tokenizer, n=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.mul_(1 + 0.1 * torch.randn_like(p))  # norms of trained models are not 1
    save(model, tokenizer, tmp_path / "model")
    model, _ = machine.load(tmp_path / "model", train=True)
    return model, batch, rollout, tmp_path / "model"


def run_of(machine, folder, **settings):
    """What `load_reference` and `Run.load` read of a run."""
    config = la_dapo.Config(**settings)
    run = types.SimpleNamespace(config=config, machine=machine, state=None)
    run.start_folder = lambda: folder
    return run


def test_the_kl_of_equal_models_is_0(policy, machine):
    """Breaks if the KL's reference, or LoRA's frozen model, computes otherwise than the policy."""
    model, batch, rollout, folder = policy
    run = run_of(machine, folder, kl=0.1)
    reference = la_dapo.load_reference(run, model)
    adapted, _ = Run.load(run_of(machine, folder, lora_rank=3))
    how = batch, rollout, 0.9
    with torch.no_grad(), machine.autocast():
        expected = token_logprobs(model, *how)
        assert torch.equal(reference(token_logprobs, *how), expected)
        assert torch.equal(token_logprobs(adapted, *how), expected)
    with torch.no_grad():
        assert (token_logprobs(model, *how) - expected).abs().max() > 1e-3  # it was bf16
    sizes = {p.dtype for p in reference.model.parameters()}
    assert sizes == {torch.float32, torch.bfloat16}


def test_what_decodes_is_the_policy(policy, machine):
    """Breaks if rollouts come from other numbers than the policy's under autocast, or if the copy
    rounds its matrices at every token, or takes more than 2 bytes for each weight of them.
    """
    model, batch, _, folder = policy
    copy, how = machine.decoder(model), dict(max_new_tokens=24, n=3, temperature=1.0, top_p=0.9)
    with machine.autocast():
        one, two = (
            generate(m, batch, generator=torch.Generator().manual_seed(3), **how)
            for m in (model, copy)
        )
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.logprobs, two.logprobs)
    assert all(torch.equal(a, b) for a, b in zip(one.latents, two.latents))
    assert any(len(z) for z in one.latents)
    own = {p.data_ptr() for p in model.parameters()}
    new = [p for p in copy.parameters() if p.data_ptr() not in own]
    assert copy.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in new} == {torch.bfloat16} and min(p.ndim for p in new) == 2
    assert not any(p.requires_grad for p in copy.parameters())
    assert model.lm_head.weight.dtype == torch.float32
    machine.bf16 = False
    assert machine.decoder(model) is model


def test_a_reference_of_ranks_is_rounded_as_fsdp_rounds(policy, machine):
    """Breaks if --shard's reference keeps in fp32 what the policy's ranks gather in bf16."""
    machine.shard = True
    reference, _ = machine.load(policy[3], frozen=True)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}


def test_the_head_of_many_pieces_has_one_rounded_gradient(model, monkeypatch):
    """Breaks if with --shard, whose weights are bf16 in a forward, the gradients of the pieces of a
    long update are added up in bf16. Against one piece in float64.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(512, 96, generator=generator).bfloat16().requires_grad_()
    chosen = torch.randint(model.lm_head.out_features, (512,), generator=generator)
    head = model.bfloat16().lm_head.weight
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(latent_decode, "LOGITS_AT_ONCE", 16)
        loss = decisions(model, h, chosen, 0.9)[0].sum()
    (got,) = torch.autograd.grad(loss, head)
    monkeypatch.setattr(latent_decode, "LOGITS_AT_ONCE", 512)
    h, head = h.detach().double(), model.double().lm_head.weight
    (exact,) = torch.autograd.grad(decisions(model, h, chosen, 0.9)[0].sum(), head)
    error = (got.double() - exact).norm() / exact.norm()
    assert got.dtype == torch.bfloat16 and error < 0.003, error


def test_the_patch_embedding_is_the_convolution(model):
    """Breaks if CUDA's product of the patches is not the convolution of the released weights."""
    layer = model.model.visual.patch_embed.proj
    x = torch.randn(7, 3, 2, 16, 16)
    conv = torch.nn.functional.conv3d(x, layer.weight, layer.bias, stride=layer.stride).flatten(1)
    assert torch.equal(layer(x), conv)  # on a CPU
    torch.testing.assert_close(layer.product(x), conv, atol=1e-5, rtol=0)
    names = [name for name in model.state_dict() if "patch_embed" in name]
    assert names == [f"model.visual.patch_embed.proj.{name}" for name in ("weight", "bias")]


@pytest.mark.parametrize("stock", [Qwen3VLTextRMSNorm, Qwen3VLMoeTextRMSNorm])
def test_the_norm_is_transformers(stock):
    """Breaks if the fused norm is another in fp32, its result has another dtype, or it is rounded
    more often than transformers' own.
    """
    norm = stock(64)
    norm.weight.data.uniform_(0.5, 1.5)
    fused, x = FusedRMSNorm(norm), 3 * torch.randn(50, 64)
    both = [torch.autograd.grad(f(x).square().sum(), norm.weight)[0] for f in (norm, fused)]
    assert torch.equal(*both) and torch.equal(fused(x), norm(x))
    for y, weight in itertools.product((x, x.bfloat16()), (norm.weight, norm.weight.bfloat16())):
        fused.weight = norm.weight = torch.nn.Parameter(weight.detach())
        exact = y.double() * y.double().square().mean(-1, keepdim=True).rsqrt() * weight
        errors = [((f(y) - exact) / exact).abs().max() for f in (fused, norm)]
        assert fused(y).dtype == norm(y).dtype and errors[0] <= errors[1] + 1e-6


def test_no_norm_of_words_is_left_to_transformers(model):
    """Breaks if a norm keeps its many kernels, or a weight gets another name."""
    text = model.model.language_model
    norms = [m for m in text.modules() if "RMSNorm" in type(m).__name__]
    assert len(norms) == 4 * len(text.layers) + 1
    assert all(isinstance(m, FusedRMSNorm) for m in norms)
    assert "model.language_model.layers.0.self_attn.q_norm.weight" in model.state_dict()


def test_cudnn_does_not_attend():
    """Breaks if PyTorch may take cuDNN's attention on a H100."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
