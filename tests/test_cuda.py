"""What only a GPU can show: `make gpu` runs these; where there is none they are skipped.

Tolerances: fp32 is summed in another order; bf16 has 8 bits, which is 1 % of the logits of a few
layers.
"""

import dataclasses
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from test_evaluate import config as evaluate_settings
from test_la_dapo import loud  # noqa: F401  a fixture
from test_la_dapo import settings as rl_settings
from test_latent_decode import EOS, ROWS, shuffle, spans
from test_model import make_batch
from test_sft import read_log
from test_sft import settings as sft_settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

import evaluate
import la_dapo
import latent_decode
import sft
from common import shared_prefix
from common.shared_prefix import Layout, causal
from latent_decode import generate, replay, token_logprobs
from model import FusedRMSNorm, load
from sft import sft_loss
from tests.common import test_shared_prefix as by_hand
from tools import bench, rehearse
from tools.pretended import PretendedGPU
from tools.shapes import SHAPES, make, prompt, random_group, sft_sample
from variants import (
    m2la,
    mcr,
    mcr_sft,
    noisy_latents,
    opd,
    own_path,
    self_forcing,
    set_spans,
    video_latent,
)

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
EMULATED = "tests.emulated" in sys.modules  # then shapes are small
SHAPE = "tiny" if EMULATED else "2b"
HIDDEN = SHAPES[SHAPE].text["hidden_size"]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL = bench.Config(
    shape=SHAPE, decoder=SHAPE, images=1, words=40, n=4, new_tokens=48, sft_tokens=400
)


@pytest.fixture(autouse=True)
def whole_fp32(monkeypatch):
    """No TF32 in the tower's convolution: it has 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(batch, device=DEVICE):
    return {name: x.to(device) for name, x in batch.items()}


def rollout_on(device, rollout):
    """A Rollout with its tensors on a device."""
    tensors = {k: v.to(device) for k, v in vars(rollout).items() if isinstance(v, torch.Tensor)}
    latents = [z.to(device) for z in rollout.latents]
    return dataclasses.replace(rollout, latents=latents, **tensors)


def check_captured(monkeypatch, model, batch, **settings):
    """The same rollouts, captured and plain -> the plain ones."""
    captures, capture = [], latent_decode.CapturedStep.capture

    def counted(*args):
        captures.append(1)
        return capture(*args)

    monkeypatch.setattr(latent_decode.CapturedStep, "capture", counted)
    plain, captured = (
        generate(
            model, batch, generator=torch.Generator().manual_seed(1), cuda_graph=graph, **settings
        )
        for graph in (False, True)
    )
    assert len(captures) > 1  # again when the caches grow or rows leave
    assert torch.equal(plain.tokens, captured.tokens) and plain.finish == captured.finish
    assert torch.equal(plain.sampled, captured.sampled)
    torch.testing.assert_close(plain.logprobs, captured.logprobs, atol=1e-4, rtol=0)
    for ours, theirs in zip(plain.latents, captured.latents):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    return plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_is_the_plain_step(monkeypatch, model, tokenizer, temperature):
    """Breaks if a captured step reads what an earlier one left, or writes to another place."""
    model = shuffle(model, seed=0).to(DEVICE)
    batch = moved(make_batch(tokenizer, ROWS, "left"))
    eos = tokenizer.convert_tokens_to_ids(EOS.split())
    settings = dict(max_new_tokens=40, n=2, temperature=temperature, top_p=0.9, eos_token_id=eos)
    plain = check_captured(monkeypatch, model, batch, **settings)
    assert len(set(plain.lengths.tolist())) > 1  # rows leave
    assert any(spans(row.tolist(), model.config) for row in plain.tokens)


def test_a_captured_step_of_a_real_shape(monkeypatch):
    """Breaks as above, in bf16 and with the released vocabulary."""
    model = make(SHAPE, 3, torch.bfloat16, DEVICE).eval()
    settings = dict(max_new_tokens=40, n=8, temperature=0.9, top_p=0.99)
    check_captured(monkeypatch, model, prompt(REAL, 2, DEVICE), **settings)


def test_a_record_of_the_gpu_replays_on_both(model, tokenizer):
    """Breaks if the GPU's kernels decode or replay something else than the CPU's."""
    model = shuffle(model, seed=0).to(DEVICE)
    batch = make_batch(tokenizer, ROWS, "left")
    settings = dict(max_new_tokens=24, n=2, temperature=1.0, top_p=0.9)
    rollout = generate(model, moved(batch), generator=torch.Generator().manual_seed(2), **settings)
    assert any(len(z) for z in rollout.latents)
    for device in (DEVICE, "cpu"):
        model.to(device)
        with torch.no_grad():
            logprobs = token_logprobs(
                model, moved(batch, device), rollout_on(device, rollout), temperature=1.0
            )
        torch.testing.assert_close(logprobs.cpu(), rollout.logprobs.cpu(), atol=1e-3, rtol=0)


@torch.no_grad()
def test_logits_in_bf16():
    """Breaks if bf16 weights or autocast lose more than their bits: 2 % of the logits' norm."""
    model, batch = make(SHAPE, 4, torch.float32, DEVICE).eval(), prompt(REAL, 1, DEVICE)
    exact = model.logits(model.hidden(**batch)[0])
    with torch.autocast(DEVICE, torch.bfloat16):
        under_autocast = model.logits(model.hidden(**batch)[0])
    model.bfloat16()
    in_bf16 = model.logits(model.hidden(**batch)[0])
    for logits in (under_autocast, in_bf16):
        assert logits.dtype == torch.float32
        assert 0 < (logits - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_a_row_of_sequences(dtype, tolerance):
    """Breaks if a CUDA kernel is not causal from the lower right, forward or backward."""
    exact, ours = [], []
    for i, heads in enumerate((by_hand.H, by_hand.H_KV, by_hand.H_KV)):
        x = (
            by_hand.states(sum(by_hand.LENGTHS), heads, i).detach().to(dtype)
        )  # rounded once, for both
        exact.append(x.double().requires_grad_())
        ours.append(x.to(DEVICE).requires_grad_())
    sequences = by_hand.LENGTHS, by_hand.PROMPT_OF
    expected = by_hand.plain(*exact, by_hand.seen_by(*sequences))
    out = Layout(by_hand.LENGTHS, DEVICE, by_hand.PROMPT_OF).attend(0, *ours, by_hand.SCALE)[0]
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    wanted = torch.autograd.grad((expected * weight.double()).sum(), exact)
    got = torch.autograd.grad((out * weight.to(DEVICE, dtype)).sum(), ours)
    for a, b in ((out, expected), *zip(got, wanted)):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < tolerance


def random_heads(T, P):
    """Queries (3, 4, T, 64), keys and values (3, 2, P + T, 64) in bf16, with gradients."""
    shapes = (3, 4, T, 64), (3, 2, P + T, 64), (3, 2, P + T, 64)
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in heads]


@pytest.mark.parametrize("P", [0, 7])
def test_attention_is_a_flash_kernel(P):
    """Breaks if PyTorch would build a mask: no other kernel is allowed here."""
    q, k, v = random_heads(5, P)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        causal(q, k, v, 0.125).float().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("P", [0, 7])
def test_flash_attn_agrees(P, monkeypatch):
    """Breaks if the flash-attn package, where it is installed, attends to something else."""
    pytest.importorskip("flash_attn")
    heads = random_heads(5, P)
    assert shared_prefix.flash_attends(heads[0])
    theirs = causal(*heads, 0.125)
    monkeypatch.setattr(shared_prefix, "flash_attends", lambda query: False)
    ours = causal(*heads, 0.125)
    torch.testing.assert_close(theirs, ours, atol=2e-2, rtol=0)
    gradients = (torch.autograd.grad(out.float().square().sum(), heads) for out in (theirs, ours))
    for a, b in zip(*gradients):
        assert (a - b).float().norm() < 2e-2 * b.float().norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_steps_of_a_real_shape(checkpointing):
    """Breaks if a step does not run in fp32 weights and bf16 arithmetic, or does not learn."""
    model = bench.make_trainable(SHAPE, 3, DEVICE)
    bench.checkpoint_activations(model, checkpointing)
    batch = sft_sample(REAL, DEVICE)
    frames = batch.pop("future_pixel_values"), batch.pop("future_grid_thw")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with bench.autocast(model.device):
            loss = sft_loss(model, latents=model.encode_frames(*frames), **batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(math.isfinite(loss) for loss in losses) and losses[2] < losses[0]


def test_an_rl_step_of_a_real_shape():
    """Breaks if rolling out and learning do not run as la_dapo.py does them, if the record and its
    replay part by more than bf16 explains, or if checkpointing changes the gradient.
    """
    model, batch = bench.make_trainable(SHAPE, 3, DEVICE), prompt(REAL, 1, DEVICE)
    settings = dict(max_new_tokens=48, n=4, temperature=0.9, top_p=0.99, cuda_graph=True)
    with bench.autocast(model.device):
        rollout = generate(model, batch, generator=torch.Generator().manual_seed(0), **settings)
    with bench.autocast(model.device), torch.no_grad():
        again = replay(model, batch, rollout, 0.9).logprobs
    error = (again - rollout.logprobs)[rollout.sampled]
    assert error.square().mean().sqrt() < 0.1

    # a random model seldom opens a span: rows that have some
    rollout = random_group(REAL, model.config.text_config.hidden_size, DEVICE, shortest=0.5)
    advantages, gradients = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]], device=DEVICE), []
    for checkpointing in (False, True):
        bench.checkpoint_activations(model, checkpointing)
        model.zero_grad()
        loss = bench.update(model, batch, rollout, advantages, terms=8)
        assert loss.isfinite()
        gradients.append(model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
    assert gradients[0].isfinite().all() and gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def gradient_of(model):
    """All of it, in one row on the CPU."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([grad.float().cpu().flatten() for grad in grads])


@pytest.mark.parametrize("terms", [None, 0, 8])
def test_a_gradient_is_the_cpus(terms):
    """Breaks if both a step and its checkpointed twin are wrong on CUDA: SFT, update, adjoint."""
    gradients = []
    prompts, rows = prompt(REAL, 1, "cpu"), bench.rows_of(REAL, [300, 340])
    rollout = random_group(REAL, HIDDEN, "cpu", shortest=0.5)
    A = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])
    model = make(SHAPE, 3).train()
    for device in ("cpu", DEVICE):
        model.zero_grad()
        model.to(device)
        if terms is None:
            bench.sft(model, moved(rows, device))
        else:
            group = moved(prompts, device), rollout_on(device, rollout), A.to(device)
            bench.update(model, *group, terms=terms)
        gradients.append(gradient_of(model))
    exact, ours = gradients
    assert exact.norm() > 0 and (ours - exact).norm() < 0.05 * exact.norm()


def test_the_towers_first_layer():
    """Breaks if the embedding of patches, or its gradient, is not that of the released layer."""
    layer, pixels = make(SHAPE, 1).model.visual.patch_embed, torch.randn(512, 1536)
    weight, bias = layer.proj.weight.detach().clone().requires_grad_(), layer.proj.bias.detach()
    cubes = pixels.view(-1, *weight.shape[1:])
    expected = torch.nn.functional.conv3d(cubes, weight, bias, stride=weight.shape[2:]).flatten(1)
    expected.square().sum().backward()
    layer.to(DEVICE)
    with bench.autocast(torch.device(DEVICE)):
        out = layer(pixels.to(DEVICE))
    out.float().square().sum().backward()
    for ours, exact in ((out, expected), (layer.proj.weight.grad, weight.grad)):
        assert (ours.float().cpu() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("prompts, new_tokens", [(1, 40), (8, 40), (1, 2048)])
def test_decoding_gives_its_memory_back(prompts, new_tokens):
    """Breaks if a cache, a graph or its private memory outlives the rollouts. As la_dapo.py
    decodes: fp32 weights, bf16 arithmetic, a captured step.
    """
    model, before = make(SHAPE, 3, device=DEVICE).eval(), torch.cuda.memory_allocated()
    batch = prompt(REAL, 1 if EMULATED else prompts, DEVICE)
    new_tokens = 20 if EMULATED else new_tokens
    with bench.autocast(model.device):
        rollout = bench.decode(model, batch, new_tokens, 8, cuda_graph=True)
    assert set(rollout.lengths.tolist()) == {new_tokens}
    del rollout, batch
    bench.free()
    assert abs(torch.cuda.memory_allocated() - before) < before / 10


def test_a_trained_model_replays_what_it_decoded():
    """Breaks if scores, larger in a trained model, are rounded otherwise in decoding."""
    model, tokenizer = load(os.path.join(ROOT, "taste", "model"))
    for name, p in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            p.data.mul_(2)
    ids = tokenizer("which wall does the ball hit next ?", return_tensors="pt")["input_ids"]
    batch, model = moved(dict(input_ids=ids, attention_mask=torch.ones_like(ids))), model.to(DEVICE)
    settings = dict(max_new_tokens=60, n=8, temperature=1.0)
    with torch.no_grad(), bench.autocast(model.device):
        rollout = generate(model, batch, generator=torch.Generator().manual_seed(0), **settings)
        again = replay(model, batch, rollout, 1.0).logprobs
    error = (again - rollout.logprobs)[rollout.sampled]
    assert error.square().mean().sqrt() < 0.03


# ------------------------------------------------------------------- what the emulation cannot show

on_a_card = pytest.mark.skipif(EMULATED, reason="needs kernels and memory of a real GPU")


@on_a_card
def test_attention_at_many_lengths():
    """Breaks if cuDNN or plain products attend, or each new length costs a plan."""
    model = bench.make_trainable("2b", 3, DEVICE)

    def steps(lengths):
        for n in lengths:
            bench.sft(model, bench.rows_of(REAL, [n], DEVICE))

    steps([400])
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps([410])
    kernels = " ".join(event.key for event in profiler.key_averages())
    assert "flash_fwd" in kernels and "flash_bwd" in kernels and "cudnn" not in kernels
    steps([600])
    one = bench.seconds(lambda: steps([600] * 10), DEVICE)
    ten = bench.seconds(lambda: steps(range(555, 655, 10)), DEVICE)
    assert ten < 1.3 * one


@on_a_card
@pytest.mark.parametrize("width", [128, 2048])
def test_a_norm_is_one_kernel(width):
    """Breaks if PyTorch's norm falls back to many kernels for these sizes or for fp32."""
    norm = FusedRMSNorm(Qwen3VLTextRMSNorm(width)).to(DEVICE)
    x = torch.randn(64, width, device=DEVICE)
    norm(x)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        norm(x)
    on_gpu = torch.autograd.DeviceType.CUDA
    assert len([event for event in profiler.events() if event.device_type == on_gpu]) == 1


@on_a_card
def test_memory_is_what_was_rehearsed():
    """Breaks if tools/rehearse.py is off by more than a tenth, or fragments cost more than that."""
    config = rehearse.Config(shape="2b")
    with (gpu := PretendedGPU(DEVICE)):
        fake = rehearse.Rehearsal(config, gpu)
        bench.checkpoint_activations(fake.model, True)
        fake.case("SFT, checkpointing, rehearsed", fake.sft)
    (figures,) = fake.cases.values()
    real = rehearse.Rehearsal(config, SimpleNamespace(device=DEVICE))
    bench.checkpoint_activations(real.model, True)
    real.sft()
    allocated, reserved = bench.peak_of(real.sft, DEVICE), torch.cuda.max_memory_reserved()
    print(f"measured: {allocated / 1e9:.1f} GB, reserved {reserved / 1e9:.1f} GB")
    assert allocated == pytest.approx(figures["bytes"], rel=0.1) and reserved < 1.1 * allocated


@on_a_card
def test_the_longest_row():
    """Breaks if a kernel or its memory has a limit below sft.py's max_length."""
    model = bench.make_trainable("8b", 9, DEVICE)
    bench.checkpoint_activations(model, True)
    assert bench.sft(model, bench.rows_of(REAL, [16384], DEVICE)).isfinite()


# ---------------------------------------------------------------------------------------- trainings

SMALL = dict(steps=3, global_batch=4, micro_batch=2, save_every=2)
SETS = dict(schedule="random", slots=7, stop_term=False, l_max=4, image_max_tokens=4)
LOOPS = dict(max_turns=6, lambda_c=0.0, lambda_d=0.0, kl=0.0, adjoint_terms=0)
PLAIN = dict(latent_head="", latent_loss="mse", stop_term=False, n_latents=2)


def check_log(out):
    """Three steps that learnt -> their lines."""
    log = read_log(out)
    assert len(log) == 3 and all(math.isfinite(line["grad_norm"]) for line in log), log
    return log


@pytest.mark.parametrize(
    "script, more",
    [
        (sft, dict(freeze_vision=False, gradient_checkpointing=True)),
        (sft, dict(lora_rank=2, latent_head="")),
        (self_forcing, dict(self_forcing_from=0.0)),
        (set_spans, SETS),
        (mcr_sft, {}),
        (video_latent, PLAIN),
        (m2la, dict(rank=20)),
    ],
)
def test_three_steps_of_a_fine_tuning(script, more, world, tmp_path):
    """Breaks if a device or a dtype is wrong anywhere in a training with spans."""
    script.train(sft_settings(world, tmp_path, script.Config, **SMALL, **more))
    check_log(tmp_path)


@pytest.mark.parametrize(
    "script, more",
    [
        (la_dapo, dict(lora_rank=2, adjoint_terms=0)),
        (la_dapo, dict(merge_equal=True, minibatches=2)),
        (own_path, {}),
        (noisy_latents, dict(density="sum", adjoint_terms=0, kl=0.0)),
        (mcr, LOOPS),
    ],
)
def test_three_steps_of_reinforcement(script, more, world, loud, tmp_path):  # noqa: F811
    """Breaks as above, in rollouts, rewards and updates."""
    config = vars(rl_settings(world, loud, tmp_path, steps=3))
    script.train(script.Config(**{**config, **more}))
    check_log(tmp_path)


def test_three_steps_of_distillation(world, loud, tmp_path):  # noqa: F811
    """Breaks as above, with a teacher that sees a hint."""
    shared = vars(rl_settings(world, loud, tmp_path, steps=3, prompts=4, group_size=2))
    names = {field.name for field in dataclasses.fields(opd.Config)}
    shared = {name: value for name, value in shared.items() if name in names}
    shared.update(adjoint_terms=0, privilege="answer", marker="where is the ball ?")
    opd.train(opd.Config(**shared))
    check_log(tmp_path)


def without_last(out):
    """A copy of a run of three steps, as if it had been killed after the second."""
    shutil.copytree(out, f"{out}_again")
    shutil.rmtree(f"{out}_again/step_000003")
    return f"{out}_again"


def test_the_pipeline_and_its_resume(world, loud, tmp_path):  # noqa: F811
    """Breaks if the scripts do not run with their workers and the captured step, if equal weights
    have a KL, or if a resumed run goes on elsewhere.
    """
    fine_tuned = sft_settings(world, tmp_path / "sft", **SMALL, workers=2)
    learnt = dict(cuda_graph=True, rollout_batch=2, kl=0.1, save_every=2, workers=2, steps=3)
    learnt = rl_settings(world, loud, tmp_path / "rl", **learnt)
    for script, config, figure in ((sft, fine_tuned, "loss"), (la_dapo, learnt, "total")):
        script.train(config)
        log = check_log(config.out)
        again = dataclasses.replace(config, out=without_last(config.out), resume=True)
        script.train(again)
        # sums of a GPU have no fixed order
        for name in (figure, "grad_norm"):
            expected = pytest.approx(log[2][name], rel=0.05, abs=1e-3)
            assert check_log(again.out)[2][name] == expected
    assert log[0]["kl"] == 0 < log[2]["kl"]
    scores = evaluate.evaluate(evaluate_settings(world, tmp_path / "eval", model=fine_tuned.out))
    assert scores["all"]["n"] == 8
    assert os.path.exists(tmp_path / "eval" / "report.html")


def test_the_bench_in_small():
    """Breaks if a measurement of tools/bench.py does not run on a GPU."""
    sizes = dict(n=2, images=1, words=8, new_tokens=20, sft_tokens=300, rounds=1)
    figures = bench.main(bench.Config(shape="tiny", decoder="tiny", **sizes))
    cases = [case for name, case in figures.items() if name[:3] in ("dec", "SFT", "upd")]
    assert [len(case) for case in cases] == [3, 2, 6]
    for case in cases:
        for name, figure in case.items():
            assert 0 < figure["bytes"] < figure["reserved"] and figure["seconds"], name
