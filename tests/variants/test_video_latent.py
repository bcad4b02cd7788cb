"""Latents learnt from answers: the passes are decoding, their gradient is exact, the losses are
what they say.
"""

import json

import numpy as np
import pytest
import torch
from test_sft import SMALL, assert_resumes, read_log, settings, weights

import evaluate
import sft
from common.formats import Skipped, read_rows
from data import collate, model_inputs
from model import load
from variants import video_latent
from variants.video_latent import (
    TAU,
    Config,
    Model,
    Spanned,
    batch_sums,
    diversity_loss,
    inject,
    pairwise_cosine,
    prepare,
    unroll,
    with_answer,
    without_chain,
)

SPANS = dict(latent_head="", latent_loss="mse", stop_term=False)
N = 3


def encoded(world, n=N):
    """A model whose head does something, and rows of four groups about four clips, with a span of
    n each.
    """
    model, tokenizer = load(world["model"], cls=Model)
    inject(model)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.latent_head.w2.weight, std=0.2)
    rows = without_chain([read_rows(world["data"])[i] for i in (0, 5, 10, 15)])
    config = settings(world, "unused", Config, **SPANS, n_latents=n)
    samples = Spanned(rows, tokenizer, config, train=True)
    return model, tokenizer, [samples[i] for i in range(4)]


@pytest.fixture
def answers(world):
    """(model, tokenizer, batch)."""
    model, tokenizer, samples = encoded(world)
    return model, tokenizer, collate(samples, 0)


def sums_of(model, batch, probe=False, **more):
    """-> the two sums of a batch, its figures."""
    config = Config(**{"n_latents": N, "alpha": 0.0, "beta": 0.0, **more})
    *sums, figures = batch_sums(model, batch, probe, config)
    return sums, figures


# ----------------------------------------------------------------------------------------- N passes


def test_the_gradient_is_that_of_a_loop_over_tokens(world):
    """Breaks if N passes do not give the latents that decoding feeds one after another, a pass is
    left out of the gradient, or a latent reaches another row. In float64.
    """
    model, _, samples = encoded(world, n=2)
    model.double().requires_grad_(True)
    layers = model.model.language_model.layers
    trained = [model.latent_head.w1.weight, model.latent_head.w2.weight, model.lm_head.weight]
    trained += [layers[0].self_attn.q_proj.weight, layers[1].mlp.down_proj.weight]

    slow = 0
    for sample in samples:  # one token after another, the whole sequence again each time
        media = model_inputs(collate([sample], 0))
        ids, _ = media.pop("input_ids"), media.pop("attention_mask")
        start, z = int((ids[0] == model.config.latent_start_id).nonzero()), []
        for k in range(2):
            fed = torch.stack(z) if z else None
            h, _ = model.hidden(ids[:, : start + 1 + k], latents=fed, **media)
            z.append(model.to_latent(h[0, -1]))
        h, _ = model.hidden(ids, latents=torch.stack(z), **media)
        labels = torch.tensor(sample["labels"])
        logp = model.logits(h[0])[:-1].log_softmax(-1)
        logp = logp.gather(1, labels[1:, None].clamp(min=0))[:, 0]
        pair = torch.cosine_similarity(z[0], z[1], dim=0).clamp(min=0)
        slow = slow - logp[labels[1:] != -100].sum() + 2 * 0.3 * pair
    (words, latents), _ = sums_of(model, collate(samples, 0), n_latents=2, beta=0.3)
    assert latents > 1e-3 and (words + latents).item() == pytest.approx(slow.item(), rel=1e-9)
    fast = torch.autograd.grad(words + latents, trained)
    for a, b in zip(fast, torch.autograd.grad(slow, trained)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert b.abs().max() > 1e-5


def test_the_head_by_hand_and_in_a_folder(world, tmp_path):
    """h + W2 silu(W1 RMSNorm(h)). Breaks if a part is missing, it is not the identity at first, or
    it is lost with a save.
    """
    model, tokenizer = load(world["model"])
    prepare(model, Config(n_latents=7))
    h = torch.randn(2, 3, 96)
    assert torch.equal(model.to_latent(h), h)
    torch.nn.init.normal_(model.latent_head.w2.weight)
    w1, w2 = (p.detach().numpy() for p in model.latent_head.parameters())
    normal = h.numpy() / np.sqrt((h.numpy() ** 2).mean(-1, keepdims=True))
    inner = normal @ w1.T
    expected = h.numpy() + (inner / (1 + np.exp(-inner))) @ w2.T
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path), cls=Model)
    np.testing.assert_allclose(again.to_latent(h).detach(), expected, rtol=1e-4, atol=1e-4)
    assert again.config.n_latents == 7


# ------------------------------------------------------------------------------------------- losses


def test_diversity_by_hand():
    """Breaks if the pairs, the floor at 0 or the mean are wrong, or lengths of vectors count."""
    e = torch.eye(4)
    assert diversity_loss(torch.stack([e[0], -e[0]])[None]) == diversity_loss(e[None, :1]) == 0
    z = torch.randn(2, 5, 7)
    by_loop = []
    for row in z.numpy():
        unit = row / np.linalg.norm(row, axis=1, keepdims=True)
        pairs = [max(0.0, unit[i] @ unit[j]) for i in range(5) for j in range(i + 1, 5)]
        by_loop.append(2 / (5 * 4) * sum(pairs))
    np.testing.assert_allclose(diversity_loss(z), by_loop, rtol=1e-5)


def test_the_answer_is_shown_in_the_question(answers):
    """Breaks if a token of the prompt is lost or moved, or the answer is not where it should be."""
    model, tokenizer, batch = answers
    ids, mask = with_answer(batch, model.config)
    for row, real, record, own in zip(ids, mask.bool(), batch["rows"], batch["input_ids"]):
        text, own = (tokenizer.decode(x).replace(" ", "") for x in (row[real], own))
        answer = f"<answer>{record.answer}</answer>"
        question, rest = text.split(answer)
        assert question.endswith("?") and rest.startswith("<|im_end|>")
        assert rest.endswith("<|latent_start|>" + "<|latent|>" * N + "<|latent_end|>")
        assert own.startswith(question + rest + answer)


# --------------------------------------------------------------------------------------------- loop


@pytest.mark.parametrize("align", ["A", "B", "C"])
def test_the_sums_of_a_batch(answers, align):
    """Breaks if a loss has another weight, sign, temperature or target: the answer's latents, the
    row's own pictures, the means of all rows.
    """
    model, _, batch = answers
    (words, latents), figures = sums_of(model, batch, align=align, alpha=0.3, beta=0.2)
    z = unroll(model, model_inputs(batch), N)
    out = model(**model_inputs(batch), latents=z.flatten(0, 1))
    h, logp = out.hidden_states[-1], out.logits.log_softmax(-1)

    # row by row
    pictures, means = [], []
    for sample in batch["samples"]:
        one = collate([sample], 0)
        pictures.append(model.encode_frames(one["pixel_values"], one["image_grid_thw"]))
        means.append(pictures[-1].mean(0))
    total = ce = 0.0
    for r in range(4):
        at = (batch["labels"][r] != -100).nonzero()[:, 0]
        ce = ce - sum(logp[r, t - 1, batch["labels"][r, t]] for t in at)
        end = int((batch["input_ids"][r] == model.config.latent_end_id).nonzero())
        if align == "A":
            ids, mask = with_answer(batch, model.config)
            inputs = dict(model_inputs(batch), input_ids=ids, attention_mask=mask)
            target = unroll(model, inputs, N)[r]
        if align == "B":
            h_a = h[r, end : at[-1]].mean(0)
            near = [torch.cosine_similarity(h_a, v, dim=0) for v in pictures[r]]
            a = torch.stack(near).div(TAU).softmax(0)
            target = (a[:, None] * pictures[r]).sum(0).expand(N, -1)
        if align == "C":
            near = [torch.cosine_similarity(z[r].mean(0), c, dim=0) / TAU for c in means]
            loss = torch.stack(near).logsumexp(0) - near[r]
        else:
            loss = 1 - torch.cosine_similarity(z[r], target, dim=-1).mean()
        total += N * (0.3 * loss + 0.2 * diversity_loss(z[r][None])[0])
    assert words.item() == pytest.approx(ce.item(), rel=1e-5)
    assert latents.item() == pytest.approx(total.item(), rel=1e-4)
    assert figures["cosine"] == pytest.approx(pairwise_cosine(z).mean().item(), rel=1e-5)


def test_probes_exchange_the_latents(answers):
    """Breaks if the log's figures of zeros or of another row's latents are of something else."""
    model, _, batch = answers
    z = unroll(model, model_inputs(batch), N).flatten(0, 1)
    ends = (batch["input_ids"] == model.config.latent_end_id).int().argmax(1)
    places = torch.arange(batch["labels"].shape[1])
    of_answer = batch["labels"].masked_fill(places <= ends[:, None], -100)

    def loss(z):
        return sft.sft_loss(model, **model_inputs(batch), labels=of_answer, latents=z)["ce"].item()

    figures = sums_of(model, batch, probe=True)[1]
    back = torch.cat([z[-N:], z[:-N]])  # each row is fed the latents of the one before it
    for name, fed in (("answer", z), ("answer_zero", 0 * z), ("answer_swapped", back)):
        assert figures[name] == pytest.approx(loss(fed), rel=1e-4)
    assert len({round(figures[f"answer{x}"], 5) for x in ("", "_zero", "_swapped")}) == 3
    assert "answer" not in sums_of(model, batch)[1]


def test_pause_feeds_the_word(answers):
    """Breaks if the control's spans hold anything but the embedding of `<|latent|>`."""
    model, _, batch = answers
    word = model.get_input_embeddings().weight[model.config.latent_id]
    (words, latents), _ = sums_of(model, batch, pause=True)
    fed = dict(model_inputs(batch), latents=word.expand(4 * N, -1))
    expected = sft.sft_loss(model, labels=batch["labels"], **fed)
    assert words.item() == pytest.approx(expected["ce_sum"].item(), rel=1e-5) and latents == 0


def test_what_has_no_evidence(answers):
    """Breaks if a row that shows nothing gives a loss of nan, or a batch of which nothing could be
    read stops a rank.
    """
    model, _, batch = answers
    text = {k: v for k, v in batch.items() if k not in ("pixel_values", "image_grid_thw")}
    is_image = text["input_ids"] == model.config.image_token_id
    text["input_ids"] = text["input_ids"].masked_fill(is_image, 1)
    with pytest.raises(ValueError, match="need rows with pictures"):
        sums_of(model, text, align="B", alpha=0.3)
    model.requires_grad_(True)
    (words, latents), _ = sums_of(model, collate([Skipped("a", "b")], 0), alpha=0.3, beta=0.2)
    assert words.item() == latents.item() == 0
    (words + latents).backward()


def test_a_run_is_saved_and_continued(world, tmp_path):
    """Breaks if head or length of the spans are not in the checkpoint, chains or futures are
    learnt from, or the loop loses the weights of the losses.
    """
    config = settings(world, tmp_path / "a", Config, **SPANS, n_latents=2, save_every=2)
    assert_resumes(video_latent.train, config)
    for line in read_log(tmp_path / "a"):
        assert line["latents"] == 8 * 2 and line["cosine"] <= 1 and line["answer_swapped"] > 0
        assert line["loss"] == pytest.approx(line["ce"] + line["latent"])
    folder = str(tmp_path / "a" / "step_000004")
    model, _ = load(folder, cls=Model)
    assert torch.equal(model.latent_head.w2.weight, weights(folder)["latent_head.w2.weight"])
    assert model.latent_head.w2.weight.abs().sum() > 0 and model.config.n_latents == 2


def test_an_evaluation_has_spans_of_one_length(world, tmp_path):
    """Breaks if evaluation lets a span stop by itself, or go on to the longest of other models."""
    model, tokenizer = load(world["model"], cls=Model)
    prepare(model, Config(n_latents=N))
    weight = model.lm_head.weight
    with torch.no_grad():  # a span that opens would stop at once by itself
        weight[model.config.latent_start_id] *= 100
        weight[model.config.latent_end_id] = 2 * weight[model.config.latent_start_id]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    shown = {name: SMALL[name] for name in ("image_max_tokens", "l_max", "max_length", "system")}
    more = dict(data=world["test"], out=str(tmp_path / "eval"), workers=0, max_new_tokens=24)
    config = evaluate.Config(**shown, **more, model=str(tmp_path / "model"))
    assert video_latent.evaluate_folder(config)["all"]["spans"] > 1
    for line in map(json.loads, open(tmp_path / "eval" / "samples.jsonl")):
        assert (line["spans"] - 1) * N <= line["latents"] <= line["spans"] * N  # one may be cut off


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(align="D"), "align is 'D'"),
        (dict(lam=0.1), "weights: alpha and beta"),
        (dict(stop_term=True), "no --no-spans, --stop_term"),
        (dict(pause=True), "alpha 0, beta 0"),
    ],
)
def test_settings_that_contradict_each_other(wrong, message):
    """Breaks if a setting that this variant has no use for is taken in silence."""
    with pytest.raises(ValueError, match=message):
        Config(**wrong)
