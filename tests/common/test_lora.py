"""Adapters, and the rows of the latent tokens: nothing at first, all that is trained, and no trace
of them in a folder.
"""

import copy
import dataclasses
import shutil
import sys

import pytest
import torch
from test_la_dapo import loud, sampled  # noqa: F401  a fixture
from test_la_dapo import settings as rl_settings
from test_sft import assert_resumes, read_log, settings, weights
from transformers import Qwen3VLForConditionalGeneration

import la_dapo
import sft
from common.lora import HEAD, WORDS, adapters, add_adapters, frozen_alone, merged
from latent_decode import token_logprobs
from model import FutureL1, load


def shaken(model, seed=3):
    """B is 0 at first: as training would, make it something else."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapters(model).values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(model, request):  # noqa: F811
    """Both ways: embeddings and output layer two matrices (8B), or one (2B, 4B)."""
    return tied(model) if request.param else model


def tied(model):
    """The same with one matrix, that of the output layer."""
    weights = model.state_dict()
    weights[WORDS] = weights[HEAD]
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    one = FutureL1(config).eval()
    one.load_state_dict(weights)
    assert one.lm_head.weight is one.get_input_embeddings().weight
    return one


def latent_ids(model):
    c = model.config
    return [c.latent_start_id, c.latent_id, c.latent_end_id]


def test_at_first_an_adapted_model_is_the_model(model, tokenizer):
    """Breaks if A, B and e add something at first, sit elsewhere than at the layers' seven matrices
    and the latent tokens, or if anything else is trained.
    """
    batch, rollout = sampled(model, tokenizer, n=2)
    with torch.no_grad():
        before = token_logprobs(model, batch, rollout, 0.9)
        after = token_logprobs(add_adapters(model, 4), batch, rollout, 0.9)
    assert torch.equal(before, after)
    D, F, Q, K, L = 96, 288, 96, 48, 2  # 4 heads and 2 key heads of 24
    sizes = [(D, Q), (D, K), (D, K), (Q, D), (D, F), (D, F), (F, D)]
    trained = [p for p in model.parameters() if p.requires_grad]
    places = 1 if model.config.tie_word_embeddings else 2
    rows = places * 3 * D
    assert sum(p.numel() for p in trained) == L * 4 * sum(a + b for a, b in sizes) + rows
    token_logprobs(model, batch, rollout, 0.9).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == L * 7 * 2 + places and all("lora" in x or "rows" in x for x in grads)
    assert all(grad.any() for name, grad in grads.items() if "lora_A" not in name)


def test_rows_by_hand(model):
    """Breaks if e is added to another row than its own, in or out; or if its gradient is not that
    of the row.
    """
    embedding, latent = model.get_input_embeddings(), latent_ids(model)
    W, U = embedding.weight.clone(), model.lm_head.weight.clone()
    rows = shaken(add_adapters(model, 4)).latent_rows
    W[latent] += rows.into
    U[latent] += rows.out
    ids, h = torch.arange(len(W))[None], torch.randn(2, 5, 96)  # all words, once
    x, logits = embedding(ids), model.logits(h)
    torch.testing.assert_close(x[0], W)
    torch.testing.assert_close(logits, h @ U.T, atol=1e-4, rtol=0)
    out = model(ids[:, :3])
    assert torch.equal(out.logits, model.logits(out.hidden_states[0]))

    to_x, to_logits = torch.randn(x.shape), torch.randn(logits.shape)
    loss = (x * to_x).sum() + (logits * to_logits).sum()
    into, out = torch.autograd.grad(loss, (rows.into, rows.out))
    of_x, of_logits = to_x[0, latent], torch.einsum("bnv,bnd->vd", to_logits, h)[latent]
    if rows.into is rows.out:
        of_x = of_logits = of_x + of_logits
    torch.testing.assert_close(into, of_x, atol=1e-4, rtol=0)
    torch.testing.assert_close(out, of_logits, atol=1e-4, rtol=0)


def test_rows_are_not_rounded_to_bf16(model):
    """Breaks if under autocast the share of e is lost, doubled, or rounded, in or out."""
    h, latent = torch.randn(2, 5, 96).bfloat16(), latent_ids(model)
    rows = shaken(add_adapters(model.bfloat16(), 4)).latent_rows
    W, ids = model.get_input_embeddings().weight, torch.tensor(latent)
    with torch.autocast("cpu", torch.bfloat16):
        logits, x = model.logits(h), model.get_input_embeddings()(ids)
    expected = h.float() @ model.lm_head.weight.float().T
    expected[..., latent] += h.float() @ rows.out.T
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(x, W[latent].float() + rows.into)


def test_a_merged_folder_and_the_frozen_model(model, tokenizer, tmp_path):
    """Breaks if 2 B A is not what is added to W, if a name of peft's is saved, or if the KL's
    reference is not the model as it began, or the adapters stay off afterwards.
    """
    batch, rollout = sampled(model, tokenizer, n=2)
    start = {name: W.clone() for name, W in model.state_dict().items()}
    with torch.no_grad():
        before = token_logprobs(model, batch, rollout, 0.9)
        shaken(add_adapters(model, 4))
        adapted = token_logprobs(model, batch, rollout, 0.9)
        reference = frozen_alone(model)(lambda m: token_logprobs(m, batch, rollout, 0.9))
        again = token_logprobs(model, batch, rollout, 0.9)
    assert torch.equal(reference, before) and torch.equal(again, adapted)
    one = model.config.tie_word_embeddings
    assert (adapted - before).abs().max() > 0.1 and len(adapters(model)) == (29 if one else 30)

    plain = merged(model, model.state_dict())
    name = "model.language_model.layers.1.mlp.down_proj"
    A, B = (model.get_parameter(f"{name}.lora_{x}.default.weight") for x in "AB")
    torch.testing.assert_close(plain[name + ".weight"], start[name + ".weight"] + 2 * B @ A)
    latent, others = latent_ids(model), torch.ones(len(start[HEAD]), dtype=torch.bool)
    others[latent] = False
    for name, e in ((WORDS, model.latent_rows.into), (HEAD, model.latent_rows.out)):
        assert torch.equal(plain[name][latent], start[name][latent] + e)
        assert torch.equal(plain[name][others], start[name][others])
        assert torch.equal(model.state_dict()[name], start[name])
    assert plain.keys() == start.keys()
    model.save_pretrained(tmp_path, state_dict=plain)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load(str(tmp_path))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == one
    with torch.no_grad():
        of_folder = token_logprobs(loaded, batch, rollout, 0.9)
    assert (of_folder - adapted).abs().max() < 1e-5 * adapted.abs().max()


def test_a_frozen_model_in_bf16(model, tokenizer):
    """Breaks if adapters are rounded to bf16, if a product's dtypes do not fit, or if what is saved
    loses what was learnt.
    """
    batch, rollout = sampled(model, tokenizer, n=2)
    shaken(add_adapters(model.bfloat16(), 4))
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_logprobs(model, batch, rollout, 0.9).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in adapters(model).values())
    saved = merged(model, model.state_dict())["model.language_model.layers.0.mlp.up_proj.weight"]
    assert saved.dtype == torch.float32 and not torch.equal(saved, saved.bfloat16().float())


def test_sft_goes_on_with_its_adapters(world, tmp_path):
    """Breaks if a resumed run adds its adapters to merged weights, or anything that decides them is
    missing from the checkpoint; or if anything but the layers' matrices changes.
    """
    config = settings(world, tmp_path / "a", lora_rank=3, save_every=2, latent_head="", lam=0.1)
    assert_resumes(sft.train, config)
    folder = tmp_path / "a" / "step_000004"
    a, b = weights(world["model"]), weights(folder)
    moved = {name for name in a if not torch.equal(a[name], b[name])}
    assert len(moved) == 14 + 2 and moved > {WORDS, HEAD}
    latent = latent_ids(load(world["model"])[0])
    for name, rows in ((WORDS, latent[::2]), (HEAD, latent)):  # <|latent|> is never fed
        assert (a[name] != b[name]).any(1).nonzero()[:, 0].tolist() == rows
    for name in moved - {WORDS, HEAD}:
        assert "language_model.layers" in name
        assert torch.linalg.matrix_rank(b[name] - a[name], rtol=1e-3) == 3, name
    _, info = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_la_dapo_with_adapters(world, loud, tmp_path):  # noqa: F811
    """Breaks if the reference is not the model it began with, if a resumed run differs, or goes on
    beside other weights than it began with.
    """
    start = str(tmp_path / "start")
    shutil.copytree(loud, start)
    more = dict(lora_rank=4, steps=2, save_every=1, kl=0.05, lr=1e-2, adjoint_terms=0)
    config = rl_settings(world, start, tmp_path / "a", **more)
    straight = weights(la_dapo.train(config))
    kl = [line["kl"] for line in read_log(tmp_path / "a")]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 1e-5
    shutil.rmtree(tmp_path / "a" / "step_000002")
    again = dataclasses.replace(config, resume=True)
    resumed = weights(la_dapo.train(again))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [line["kl"] for line in read_log(tmp_path / "a")] == kl

    shutil.rmtree(tmp_path / "a" / "step_000002")
    shutil.rmtree(start)
    shutil.copytree(world["model"], start)
    with pytest.raises(SystemExit, match="step_000001 needs .*start, .*other weights now"):
        la_dapo.train(again)


def test_what_is_asked_for_and_absent(model, monkeypatch):
    """Breaks if the package's name is not said, or parts of weights and adapters are combined."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        add_adapters(model, 4)
    for Config in (sft.Config, la_dapo.Config):
        with pytest.raises(ValueError, match="lora_rank: not with shard"):
            Config(lora_rank=4, shard=True)
        with pytest.raises(ValueError, match="lora_rank is -1"):
            Config(lora_rank=-1)
    with pytest.raises(ValueError, match="latent_head: not with lora_rank"):
        sft.Config(latent_head="linear", lora_rank=4)
