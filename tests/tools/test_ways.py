"""The two ways of a piece of work do the same work: equal losses and gradients among words."""

import dataclasses

import pytest
import torch

from tools import bench_cpu, ways
from tools.shapes import make, prompt, random_group, special

CONFIG = bench_cpu.Config(shape="tiny", n=3, images=1, words=6, new_tokens=20)


@pytest.fixture(scope="module")
def tiny():
    return bench_cpu.make_trainable("tiny")


def gradient_of(model, work):
    """work()'s loss, and the gradient it adds, by name."""
    model.zero_grad()
    loss = work()
    return loss, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def check_equal(model, ours, theirs):
    (loss, gradient), (other, others) = gradient_of(model, ours), gradient_of(model, theirs)
    torch.testing.assert_close(loss, other, atol=1e-5, rtol=0)
    assert gradient.keys() == others.keys() and len(gradient) > 10
    for name in gradient:
        error = (gradient[name].double() - others[name].double()).norm()
        assert error <= 1e-4 * others[name].double().norm(), name


def words_only(rollout, config):
    """A rollout without spans."""
    ids = special(config.shape)
    spans = torch.isin(rollout.tokens, torch.tensor([*ids.latent_ids.values()]))
    tokens = rollout.tokens.masked_fill(spans, 4321)
    latents = [z[:0] for z in rollout.latents]
    return dataclasses.replace(rollout, tokens=tokens, latents=latents)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_with_copied_prompts_is_the_same(tiny, checkpointing):
    """Breaks if a baseline learns from padding, other words, or another place of a picture."""
    batch = prompt(CONFIG, 1, "cpu")
    rollout = words_only(random_group(CONFIG, 64, "cpu", shortest=0.25), CONFIG)
    assert rollout.lengths.tolist() == [16, 18, 20]
    group = tiny, batch, rollout, torch.tensor([[1.0], [-2.0], [0.5]])
    ways.checkpoint_activations(tiny, checkpointing)
    check_equal(tiny, lambda: ways.update(*group), lambda: ways.naive_update(*group))
    ways.checkpoint_activations(tiny, False)


def test_sft_of_a_padded_batch_is_the_same(tiny):
    """Breaks if a label moves or padding is learnt, in the rows or in one of the two ways."""
    batch = bench_cpu.rows_of(CONFIG, [270, 290, 301])
    real = batch["attention_mask"].sum(1).tolist()
    assert real == [270, 290, 301] and (batch["labels"] != -100).sum() == 90 + 96 + 100
    check_equal(tiny, lambda: ways.sft(tiny, batch), lambda: ways.naive_sft(tiny, batch))


def test_both_decode_the_words_that_were_asked_for():
    """Breaks if a row ends early, opens a span, or keys and values are counted wrongly."""
    model, config = make("tiny").eval(), dataclasses.replace(CONFIG, decoder="tiny")
    video = prompt(config, 1, "cpu", video=True)
    assert (video["input_ids"] == special("tiny").video).sum() == 256
    words = bench_cpu.make_sure(model, video)
    ours, theirs = (f(model, video, 20, 3) for f in (ways.decode, ways.naive_decode))
    P = video["input_ids"].shape[1]
    assert ours.tokens.shape == (3, 20) and theirs.sequences.shape == (3, P + 20)
    assert ours.lengths.tolist() == [20] * 3
    assert (theirs.sequences[:, :P] == video["input_ids"]).all()

    copied = sum(
        x.nbytes for layer in theirs.past_key_values.layers for x in (layer.keys, layer.values)
    )
    assert copied == bench_cpu.cache_formula(config, P, copied=True)
    assert bench_cpu.cache_bytes(model, video, config) == bench_cpu.cache_formula(config, P, False)
    assert bench_cpu.cache_formula(config, P, False) == 2 * 2 * 1024 * 4 * (
        P + 3 * 32
    )  # K, V; L; K

    with torch.no_grad():
        logits = model(**video).logits[0, -1]
    top = (logits / 0.9).softmax(-1).topk(words).values.double().cumsum(0)
    assert top[-1] >= 0.99 - 1e-5 and top[-2] < 0.99 + 1e-5 and words <= 1000


@torch.no_grad()
def test_no_span_opens():
    """Breaks if our rollouts are latents in part, which transformers does not decode."""
    model, text = make("tiny").eval(), prompt(dataclasses.replace(CONFIG, images=0), 1, "cpu")
    model.lm_head.weight[special("tiny").latent_start] = model.hidden(**text)[0][0, -1]
    rollout = ways.decode(model, text, 4, 2)
    assert not sum(len(z) for z in rollout.latents) and rollout.sampled.all()


def test_transformers_is_left_as_it_was(tiny):
    """Breaks if the model stays of the other class after an error."""
    with pytest.raises(KeyError), ways.stock(tiny):
        assert type(tiny).__name__ == "Qwen3VLForConditionalGeneration"
        raise KeyError
    assert type(tiny).__name__ == "FutureL1"
