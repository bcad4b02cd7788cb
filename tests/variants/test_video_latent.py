"""Latents learnt from answers: the passes are decoding, their gradient is exact, the losses are
what they say.
"""

import json
import math

import numpy as np
import pytest
import torch
from test_sft import SMALL, assert_resumes, read_log, settings, weights
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

import evaluate
import sft
from common.formats import Skipped, read_rows
from data import Samples, collate, model_inputs
from model import load
from variants import video_latent
from variants.video_latent import (
    Config,
    Model,
    Sequences,
    batch_sums,
    contrast,
    diversity_loss,
    generate,
    inject,
    mean_distance,
    pairwise_cosine,
    prepare,
    probe_due,
    read_out,
    with_answer,
    without_chain,
)

SPANS = dict(latent_head="", latent_loss="mse", stop_term=False)
N = 3


def encoded(world, n=N, train=True, rows=(0, 5, 10, 15), head=True):
    """A model, its tokenizer and rows of four groups about four clips, with a span of n each."""
    model, tokenizer = load(world["model"], cls=Model)
    if head:
        inject(model)
    all_rows = without_chain(read_rows(world["data"]), n)
    config = settings(world, "unused", Config, **SPANS)
    samples = Samples([all_rows[i] for i in rows], tokenizer, config, train=train)
    return model, tokenizer, [samples[i] for i in range(len(rows))]


@pytest.fixture
def answers(world):
    """A model whose head does something, and the batch: (model, tokenizer, batch)."""
    model, tokenizer, samples = encoded(world)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.latent_head.w2.weight, std=0.2)
    return model, tokenizer, collate(samples, 0)


def step_of(model, probe=False, **more):
    """-> a function: a batch to its two sums; `.figures` are those of its last call."""
    config = Config(**{"n_latents": N, "alpha": 0.0, "beta": 0.0, **more})

    def step(batch):
        *sums, step.figures = batch_sums(model, batch, probe, config)
        return tuple(sums)

    return step


def grown(model, sample, n, to_latent):
    """One token after another, the whole sequence again each time: latents (n, D), logits (L, V).

    sample: one of `Samples`, its row alone.
    """
    one = collate([sample], 0)
    ids, media = one["input_ids"], dict(model_inputs(one))
    del media["input_ids"], media["attention_mask"]
    start, z = int((ids[0] == model.config.latent_start_id).nonzero()), []
    for k in range(n):
        latents = torch.stack(z) if z else None
        h, _ = model.hidden(ids[:, : start + 1 + k], latents=latents, **media)
        z.append(to_latent(h[0, -1]))
    h, _ = model.hidden(ids, latents=torch.stack(z), **media)
    return torch.stack(z), model.logits(h[0])


# ----------------------------------------------------------------------------------------- N passes


@torch.no_grad()
def test_after_n_passes_the_latents_are_those_of_decoding(answers, world):
    """Breaks if a pass reads or writes a latent at the wrong place, or N passes are too few."""
    model, tokenizer, batch = answers
    z = Sequences(model, **model_inputs(batch)).unroll(N)

    model.config.n_latents = N
    _, _, prompts = encoded(world, train=False)
    c, words = model.config, range(len(tokenizer))
    rollout = generate(
        model,
        model_inputs(collate(prompts, 0, side="left")),
        max_new_tokens=N + 2,
        banned=[i for i in words if i != c.latent_start_id],
    )
    assert rollout.tokens[:, 0].eq(c.latent_start_id).all()
    assert rollout.tokens[:, 1 : N + 1].eq(c.latent_id).all() and not model.one_length
    assert rollout.tokens[:, -1].eq(c.latent_end_id).all() and not rollout.sampled[:, -1].any()
    torch.testing.assert_close(z, torch.stack(rollout.latents), atol=2e-5, rtol=0)

    # one pass more changes nothing; after N - 1 the first N - 1 are right, the last is not
    more, less = (Sequences(model, **model_inputs(batch)).unroll(k) for k in (N + 1, N - 1))
    torch.testing.assert_close(more, z, atol=2e-5, rtol=0)
    error = (less - z).abs().amax((0, 2))  # (N,)
    assert error[: N - 1].max() < 2e-5 and error[-1] > 1e-2


def wide_norm(self, x):
    """Qwen's RMSNorm in the dtype of x; transformers' own computes in fp32."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def test_the_gradient_is_that_of_a_loop_over_tokens(world, monkeypatch):
    """Breaks if a pass is left out of the gradient, or a latent reaches another row. In float64."""
    monkeypatch.setattr(Qwen3VLTextRMSNorm, "forward", wide_norm)
    model, _, samples = encoded(world, n=2)
    model.double()
    torch.nn.init.normal_(model.latent_head.w2.weight, std=0.2)
    model.requires_grad_(True)
    layers = model.model.language_model.layers
    trained = [model.latent_head.w1.weight, model.latent_head.w2.weight, model.lm_head.weight]
    trained += [layers[0].self_attn.q_proj.weight, layers[1].mlp.down_proj.weight]

    def gradient(loss):
        return [g.clone() for g in torch.autograd.grad(loss, trained)]

    slow = 0
    for sample in samples:
        z, logits = grown(model, sample, 2, model.to_latent)
        labels = torch.tensor(sample["labels"])
        logp = logits[:-1].log_softmax(-1).gather(1, labels[1:, None].clamp(min=0))[:, 0]
        pair = torch.cosine_similarity(z[0], z[1], dim=0).clamp(min=0)
        slow = slow - logp[labels[1:] != -100].sum() + 2 * 0.3 * pair
    words, latents = step_of(model, n_latents=2, beta=0.3)(collate(samples, 0))
    assert latents > 1e-3 and (words + latents).item() == pytest.approx(slow.item(), rel=1e-9)
    fast, slow = gradient(words + latents), gradient(slow)
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert b.abs().max() > 1e-5

    # only the last pass: another gradient
    unroll = Sequences.unroll

    def last_only(self, passes):
        with torch.no_grad():
            z = unroll(self, passes - 1)
        h = torch.cat([self.starts[:, None], self.follow(z)[:, :-1]], 1)
        return self.model.to_latent(h)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequences, "unroll", last_only)
        words, latents = step_of(model, n_latents=2, beta=0.3)(collate(samples, 0))
    assert (gradient(words + latents)[0] - slow[0]).norm() > 1e-3 * slow[0].norm()


@torch.no_grad()
def test_at_first_it_is_the_model_fed_its_own_states(world):
    """Breaks if the head is not the identity at the start, or its random numbers touch others."""
    model, _, samples = encoded(world)
    plain, _, _ = encoded(world, head=False)
    assert plain.latent_head is None and model.latent_head is not None
    batch = collate(samples, 0)
    sequences = Sequences(model, **model_inputs(batch))
    h = sequences.states(sequences.unroll(N))  # (B, L, D)
    logits = model.logits(h[batch["attention_mask"].bool()])
    expected = [grown(plain, sample, N, lambda h: h)[1] for sample in samples]
    torch.testing.assert_close(logits, torch.cat(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_head_by_hand_and_in_a_folder(world, tmp_path, dtype):
    """h + W2 silu(W1 RMSNorm(h)). Breaks if a part is missing, or it is lost with a save."""
    model, tokenizer = load(world["model"], dtype=dtype)
    inject(model)
    h = torch.randn(2, 3, 96, dtype=dtype)
    assert torch.equal(model.to_latent(h), h)
    torch.nn.init.normal_(model.latent_head.w2.weight)
    w1, w2 = (p.detach().numpy() for p in model.latent_head.parameters())
    normal = h.numpy() / np.sqrt((h.numpy() ** 2).mean(-1, keepdims=True))
    inner = normal @ w1.T
    expected = h.numpy() + (inner / (1 + np.exp(-inner))) @ w2.T
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path), cls=Model, dtype=dtype)
    np.testing.assert_allclose(again.to_latent(h).detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_there_stays(world):
    """Breaks if the linear head, the smaller alternative or an earlier training's, is replaced."""
    model, _ = load(world["model"], latent_head="linear")
    head = model.latent_head
    prepare(model, Config())
    assert model.latent_head is head and not hasattr(model.config, "injected")
    model, _ = load(world["model"])
    prepare(model, Config(n_latents=7))
    assert type(model.latent_head) is video_latent.Injection and model.config.n_latents == 7


# ------------------------------------------------------------------------------------------- losses


def test_diversity_by_hand():
    """Breaks if the pairs, the floor at 0 or the mean are wrong, or lengths of vectors count."""
    e = torch.eye(4)
    for z, expected in (
        (e[:3], 0.0),
        (e[[0, 0, 0]], 1.0),
        (torch.stack([e[0], -e[0]]), 0.0),
        (e[[0, 0, 1]], 1 / 3),
        (e[:1], 0.0),
    ):
        assert diversity_loss(z[None]).item() == pytest.approx(expected, abs=1e-6)

    z = torch.randn(2, 5, 7)
    by_loop = []
    for row in z.numpy():
        total = 0.0
        for i in range(5):
            for j in range(i + 1, 5):
                cosine = row[i] @ row[j] / np.linalg.norm(row[i]) / np.linalg.norm(row[j])
                total += max(0.0, cosine)
        by_loop.append(2 / (5 * 4) * total)
    np.testing.assert_allclose(diversity_loss(z), by_loop, rtol=1e-5)
    scales = torch.tensor([1.0, 9.0, 0.1, 3.0, 2.0])[None, :, None]
    torch.testing.assert_close(diversity_loss(z * scales), diversity_loss(z))
    assert pairwise_cosine(z).shape == (2, 10) and pairwise_cosine(z).min() < 0


def test_contrast_by_hand():
    """Breaks if rows are compared with themselves alone, or temperature or sign are wrong."""
    zbar = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    c = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    near = np.array([[1, math.sqrt(0.5)], [0, math.sqrt(0.5)]]) / 0.5
    expected = [math.log(np.exp(near[i]).sum()) - near[i, i] for i in range(2)]
    loss = contrast(zbar.requires_grad_(), c, tau=0.5)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)
    loss.sum().backward()
    assert c.grad is None and zbar.grad.abs().sum() > 0

    # unrelated: about log B
    torch.manual_seed(0)
    loss = contrast(torch.randn(64, 4096), torch.randn(64, 4096), tau=0.1)
    assert loss.mean().item() == pytest.approx(math.log(64), abs=0.05)


def test_read_out_by_hand():
    """Breaks if a row reads another row's pictures, or the softmax is of something else."""
    v = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    own = torch.tensor([[True, True, False], [False, False, True]])
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    a = math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 1)
    expected = [[3 * a, 2 * (1 - a)], [1.0, 1.0]]
    np.testing.assert_allclose(read_out(h, v, own, tau=0.5), expected, rtol=1e-5)

    z = torch.tensor([[[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]])
    target = torch.tensor([[[2.0, 0.0]] * 3])
    assert mean_distance(z, target).item() == pytest.approx((0 + 1 + 2) / 3)


def test_the_answer_is_shown_in_the_question(answers):
    """Breaks if a token of the prompt is lost or moved, or the answer is not where it should be."""
    model, tokenizer, batch = answers
    ids, mask = with_answer(batch, model.config)
    for row, real, record in zip(ids, mask.bool(), batch["rows"]):
        text = tokenizer.decode(row[real])
        answer = f"<answer>{record.answer}</answer>"
        assert answer in text.replace(" ", "")
        question, rest = text.replace(" ", "").split(answer)
        assert question.endswith("?") and rest.startswith("<|im_end|>")
        assert rest.endswith("<|latent_start|>" + "<|latent|>" * N + "<|latent_end|>")
        own = tokenizer.decode(batch["input_ids"][batch["rows"].index(record)]).replace(" ", "")
        assert own.startswith(question + rest) and own[len(question + rest) :].startswith(answer)


def test_align_a_is_nothing_without_the_answer(answers, monkeypatch):
    """Breaks if the teacher differs from the student by anything but the answer."""
    model, _, batch = answers
    model.latent_head.requires_grad_(True)
    step = step_of(model, align="A", alpha=0.5)

    def figures():
        _, latents = step(batch)
        (gradient,) = torch.autograd.grad(latents, model.latent_head.w2.weight)
        return latents.item(), gradient.abs().max().item()

    value, gradient = figures()
    assert value > 1e-3 and gradient > 1e-4

    def unshown(batch, c):
        end = (batch["input_ids"] == c.latent_end_id).int().argmax(1)  # (B,)
        places = torch.arange(batch["input_ids"].shape[1])
        mask = (places <= end[:, None]).long()
        return batch["input_ids"] * mask, mask

    monkeypatch.setattr(video_latent, "with_answer", unshown)
    value, gradient = figures()
    assert abs(value) < 1e-5 and gradient < 1e-6


# --------------------------------------------------------------------------------------------- loop


@pytest.mark.parametrize("align", ["A", "B", "C"])
def test_the_sums_of_a_batch(answers, align):
    """Breaks if the words are not Eq. (2)'s, a loss has another weight, or B's or C's pictures and
    states are not the row's own.
    """
    model, _, batch = answers
    step = step_of(model, align=align, alpha=0.3, beta=0.2, tau=0.5)
    words, latents = step(batch)
    sequences = Sequences(model, **model_inputs(batch))
    z = sequences.unroll(N)
    flat = z.flatten(0, 1)

    # the words by sft.py, whose Eq. (3) says that z is a fixed point
    expected = sft.sft_loss(model, **model_inputs(batch), labels=batch["labels"], latents=flat)
    assert words.item() == pytest.approx(expected["ce_sum"].item(), rel=1e-5)
    assert expected["latent"].item() < 1e-8

    # the losses, row by row
    h = model(**model_inputs(batch), latents=flat).hidden_states[-1]  # (B, L, D)
    torch.testing.assert_close(sequences.states(z), h, atol=1e-4, rtol=0)
    pictures, means = [], []
    for sample in batch["samples"]:
        one = collate([sample], 0)
        pictures.append(model.encode_frames(one["pixel_values"], one["image_grid_thw"]))
        means.append(pictures[-1].mean(0))
    total = 0.0
    for r in range(4):
        end = int((batch["input_ids"][r] == model.config.latent_end_id).nonzero())
        last = int((batch["labels"][r] != -100).nonzero()[-1])
        if align == "A":
            ids, mask = with_answer(batch, model.config)
            inputs = dict(model_inputs(batch), input_ids=ids, attention_mask=mask)
            target = Sequences(model, **inputs).unroll(N)[r]
        if align == "B":
            h_a = h[r, end:last].mean(0)
            near = [torch.cosine_similarity(h_a, v, dim=0) for v in pictures[r]]
            a = torch.stack(near).div(0.5).softmax(0)
            target = (a[:, None] * pictures[r]).sum(0).expand(N, -1)
        if align == "C":
            near = [torch.cosine_similarity(z[r].mean(0), c, dim=0) / 0.5 for c in means]
            loss = torch.stack(near).logsumexp(0) - near[r]
        else:
            loss = 1 - torch.cosine_similarity(z[r], target, dim=-1).mean()
        total += N * (0.3 * loss + 0.2 * diversity_loss(z[r][None])[0])
    assert latents.item() == pytest.approx(total.item(), rel=1e-4)
    assert step.figures["cosine"] == pytest.approx(pairwise_cosine(z).mean().item(), rel=1e-5)


def test_under_autocast_the_losses_are_about_the_same(answers):
    """Breaks if bf16 arithmetic, as on a GPU, meets another dtype or reaches the losses."""
    model, _, batch = answers
    for align in ("A", "B", "C"):
        step = step_of(model, align=align, alpha=0.3, beta=0.2)
        with torch.no_grad():
            expected = step(batch)
            with torch.autocast("cpu", torch.bfloat16):
                sums = step(batch)
        assert all(x.dtype == torch.float32 for x in sums)
        torch.testing.assert_close(sums, expected, rtol=0.05, atol=0.05)


def test_micro_batches_add_up(answers):
    """Breaks if a row's losses depend on its batch where they should not."""
    model, _, batch = answers
    step, parts = step_of(model, align="B", alpha=0.3, beta=0.2), []
    for some in (batch["samples"][:1], batch["samples"][1:]):
        parts.append(torch.stack(step(collate(some, 0))))
    torch.testing.assert_close(sum(parts), torch.stack(step(batch)), rtol=1e-5, atol=1e-5)


def test_activations_that_are_made_again(answers):
    """Breaks if the kept keys of the prompts do not stand --gradient_checkpointing."""
    model, _, batch = answers
    model.requires_grad_(True).train()
    step, gradients = step_of(model, align="A", alpha=0.3, beta=0.2), []
    for again in (False, True):
        if again:
            options = dict(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.gradient_checkpointing_enable(**options)
        model.zero_grad()
        sum(step(batch)).backward()
        weights = [p for name, p in model.named_parameters() if "language_model" in name]
        gradients.append([p.grad.clone() for p in weights])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_probes_exchange_the_latents(answers):
    """Breaks if the log's figures of zeros or of another row's latents are of something else."""
    model, _, batch = answers
    step = step_of(model, probe=True)
    z = Sequences(model, **model_inputs(batch)).unroll(N).flatten(0, 1)
    ends = (batch["input_ids"] == model.config.latent_end_id).int().argmax(1)
    places = torch.arange(batch["labels"].shape[1])
    of_answer = batch["labels"].masked_fill(places <= ends[:, None], -100)

    def loss(z):
        return sft.sft_loss(model, **model_inputs(batch), labels=of_answer, latents=z)["ce"].item()

    step(batch)
    shifted = torch.cat([z[N:], z[:N]])  # row 0 is fed row 1's, ..., the last row 0's
    back = torch.cat([z[-N:], z[:-N]])
    assert step.figures["answer"] == pytest.approx(loss(z), rel=1e-4)
    assert step.figures["answer_zero"] == pytest.approx(loss(torch.zeros_like(z)), rel=1e-4)
    swapped = step.figures["answer_swapped"]
    assert min(abs(swapped - loss(x)) for x in (shifted, back)) < 1e-4
    assert len({round(step.figures[f"answer{x}"], 5) for x in ("", "_zero", "_swapped")}) == 3

    step = step_of(model)
    step(batch)
    assert "answer" not in step.figures

    # twice in a training: in its first step, and in the first of the second half
    assert [probe_due(k, 6, 2) for k in range(6)] == [True, False, False, True, False, False]
    assert all(probe_due(k, 4, 20) for k in range(4))


def test_pause_feeds_the_word(answers):
    """Breaks if the control's spans hold anything but the embedding of `<|latent|>`."""
    model, _, batch = answers
    word = model.get_input_embeddings().weight[model.config.latent_id]
    step = step_of(model, pause=True)
    expected = sft.sft_loss(
        model, **model_inputs(batch), labels=batch["labels"], latents=word.expand(4 * N, -1)
    )
    words, latents = step(batch)
    assert words.item() == pytest.approx(expected["ce_sum"].item(), rel=1e-5) and latents == 0


def test_a_batch_that_cannot_be_read_has_weight_0(answers):
    """Breaks if the one-token stand-in of such a batch stops a rank."""
    model, _, _ = answers
    model.requires_grad_(True)
    words, latents = step_of(model, align="A", alpha=0.3, beta=0.2)(collate([Skipped("a", "b")], 0))
    assert words.item() == latents.item() == 0
    (words + latents).backward()
    assert model.latent_head.w2.weight.grad.abs().sum() == 0


def test_rows_without_pictures_are_refused(answers, tokenizer):
    """Breaks if a row that shows nothing gives a loss of nan."""
    model, _, batch = answers
    text = {k: v for k, v in batch.items() if k not in ("pixel_values", "image_grid_thw")}
    text["input_ids"] = text["input_ids"].masked_fill(
        text["input_ids"] == model.config.image_token_id, 1
    )
    for align in ("B", "C"):
        with pytest.raises(ValueError, match="need rows with pictures"):
            step_of(model, align=align, alpha=0.3)(text)
    words, _ = step_of(model, align="A", alpha=0.3)(text)
    assert words.isfinite()


def test_a_run_is_saved_and_continued(world, tmp_path):
    """Breaks if head or length of the spans are not in the checkpoint, chains or futures are
    learnt from, or the loop loses the weights of the losses.
    """
    config = settings(world, tmp_path / "a", Config, **SPANS, n_latents=2, save_every=2)
    assert_resumes(video_latent.train, config)
    lines = read_log(tmp_path / "a")
    for line in lines:
        assert line["latents"] == 8 * 2 and line["cosine"] <= 1 and line["answer_swapped"] > 0
        assert line["loss"] == pytest.approx(line["ce"] + line["latent"])

    folder = str(tmp_path / "a" / "step_000004")
    model, _ = load(folder, cls=Model)
    assert torch.equal(model.latent_head.w2.weight, weights(folder)["latent_head.w2.weight"])
    assert model.latent_head.w2.weight.abs().sum() > 0 and model.config.n_latents == 2


def evaluation(world, out, **more):
    """Settings of an evaluation of the tiny model."""
    shown = {name: SMALL[name] for name in ("image_max_tokens", "l_max", "max_length", "system")}
    own = dict(data=world["test"], out=str(out), workers=0, batch=4)
    return evaluate.Config(**shown, **own, **more)


def test_an_evaluation_has_spans_of_one_length(world, tmp_path):
    """Breaks if evaluation lets a span stop by itself, or go on to the longest of other models."""
    model, tokenizer = load(world["model"], cls=Model)
    prepare(model, Config(n_latents=N))
    c = model.config
    with torch.no_grad():  # a span that opens would stop at once by itself
        weight = model.lm_head.weight
        weight[c.latent_start_id] *= 100
        weight[c.latent_end_id] = 2 * weight[c.latent_start_id]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    more = dict(model=str(tmp_path / "model"), max_new_tokens=24)
    table = video_latent.evaluate_folder(evaluation(world, tmp_path / "eval", **more))["all"]
    assert table["spans"] > 1
    with open(tmp_path / "eval" / "samples.jsonl") as f:
        lines = [json.loads(line) for line in f]
    for line in lines:  # the last span may be cut off
        assert (line["spans"] - 1) * N <= line["latents"] <= line["spans"] * N


def test_settings_that_contradict_each_other():
    """Breaks if a setting that this variant has no use for is taken in silence."""
    for wrong, message in (
        (dict(align="D"), "align is 'D'"),
        (dict(n_latents=0), "n_latents is 0"),
        (dict(lam=0.1), "weights: alpha and beta"),
        (dict(latent_loss="nmse"), "latent_loss mse"),
        (dict(stop_term=True), "no --no-spans, --stop_term"),
        (dict(spans=False), "no --no-spans"),
        (dict(eval_data="x"), "--eval_data"),
        (dict(shard=True), "--shard"),
        (dict(lora_rank=4), "--lora_rank"),
        (dict(pause=True), "alpha 0, beta 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**wrong)
    assert Config().label != Config(pause=True, alpha=0.0, beta=0.0).label
