"""The bench in small, on a CPU: that it runs, and that both ways do the same work."""

import dataclasses
import json
import time

import pytest
import torch

from common.formats import read_rows
from data import DataConfig, collate, encode, model_inputs
from model import load
from tests.conftest import TINY_DATA
from tools import bench, shapes
from tools.shapes import make, prompt, random_group, special

CONFIG = bench.Config(
    shape="tiny", decoder="tiny", n=3, images=1, words=6, new_tokens=20, sft_tokens=300
)


@pytest.fixture(scope="module")
def tiny():
    return bench.make_trainable("tiny", 0, "cpu")


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
    bench.checkpoint_activations(tiny, checkpointing)
    check_equal(tiny, lambda: bench.update(*group), lambda: bench.usual_update(*group))
    bench.checkpoint_activations(tiny, False)


def test_sft_of_a_padded_batch_is_the_same(tiny):
    """Breaks if a label moves or padding is learnt, in the rows or in one of the two bench."""
    batch = bench.rows_of(CONFIG, [270, 290, 301])
    real = batch["attention_mask"].sum(1).tolist()
    assert real == [270, 290, 301] and (batch["labels"] != -100).sum() == 90 + 96 + 100
    check_equal(tiny, lambda: bench.sft(tiny, batch), lambda: bench.usual_sft(tiny, batch))


def test_both_decode_the_words_that_were_asked_for():
    """Breaks if a row ends early, a way decodes another number of words or another prompt, or the
    policy is less sure than it says.
    """
    model = make("tiny").eval()
    video = prompt(CONFIG, 1, "cpu", video=True)
    assert (video["input_ids"] == special("tiny").video).sum() == 256
    words = bench.make_sure(model, video)
    ours, theirs = (f(model, video, 20, 3) for f in (bench.decode, bench.usual_decode))
    P = video["input_ids"].shape[1]
    assert ours.tokens.shape == (3, 20) and theirs.sequences.shape == (3, P + 20)
    assert ours.lengths.tolist() == [20] * 3
    assert (theirs.sequences[:, :P] == video["input_ids"]).all()
    with torch.no_grad():
        logits = model(**video).logits[0, -1]
    top = (logits / 0.9).softmax(-1).topk(words).values.double().cumsum(0)
    assert top[-1] >= 0.99 - 1e-5 and top[-2] < 0.99 + 1e-5 and words <= 1000


@torch.no_grad()
def test_no_span_opens():
    """Breaks if our rollouts are latents in part, which transformers does not decode."""
    model, text = make("tiny").eval(), prompt(dataclasses.replace(CONFIG, images=0), 1, "cpu")
    model.lm_head.weight[special("tiny").latent_start] = model.hidden(**text)[0][0, -1]
    rollout = bench.decode(model, text, 4, 2)
    assert not sum(len(z) for z in rollout.latents) and rollout.sampled.all()


def test_transformers_is_left_as_it_was(tiny):
    """Breaks if the model stays of the other class after an error."""
    with pytest.raises(KeyError), bench.stock(tiny):
        assert type(tiny).__name__ == "Qwen3VLForConditionalGeneration"
        raise KeyError
    assert type(tiny).__name__ == "FutureL1"


@pytest.mark.slow
def test_the_bench(tmp_path, capsys):
    """Breaks if a case does not run, or a ratio is not that of its own round."""
    out = tmp_path / "bench.json"
    bench.main(dataclasses.replace(CONFIG, rounds=1, out=str(out)))
    figures, text = json.loads(out.read_text()), capsys.readouterr().out
    cases = [figures[name] for name in figures if name[:3] in ("dec", "SFT", "upd")]
    assert [len(case) for case in cases] == [2, 2, 6]
    update = cases[2]
    assert update["ours"]["bytes"] < update["prompt copied"]["bytes"]
    ratio = update["ours"]["seconds"][0] / update["prompt copied"]["seconds"][0]
    assert f"{ratio:.2f} ({ratio:.2f} - {ratio:.2f})" in text


def test_what_does_not_fit_or_comes_too_late():
    """Breaks if a way without memory or time stops the others, or the ways do not take turns."""
    turns = []

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    works = {"a": lambda: turns.append("a"), "full": full, "b": lambda: turns.append("b")}
    figures = bench.measured(works, "cpu", 2, time.time() + 100)
    assert turns == ["a", "b", "a", "b", "a", "b"] and figures["full"] == "out of memory"
    assert bench.measured(works, "cpu", 2, time.time() - 1)["a"] == "no time left"
    figures["a"].update(seconds=[1, 6], bytes=2**21, reserved=2**22)
    figures["b"].update(seconds=[2, 4], bytes=2**20)
    rows = bench.table(figures, "b")
    assert rows[0] == ["a", "3.5", "1.00 (0.50 - 1.50)", "2 (4)", "2.00"]
    assert rows[1][:2] == ["full", "out of memory"]


@pytest.mark.parametrize(
    "shape, weights",
    [
        ("2b", 2_127_532_032),
        ("4b", 4_437_815_808),
        ("8b", 8_767_123_696),
        ("30b-a3b", 31_070_754_032),
    ],
)
def test_a_shape_is_the_released_one(shape, weights):
    """Breaks if a size is not that of the released model, whose weights were counted."""
    model = shapes.make(shape, device="meta")
    assert sum(p.numel() for p in model.parameters()) == weights


def test_a_model_folder(world, tmp_path, monkeypatch):
    """Breaks if a model is written beside a tokenizer whose ids are not its own: it would read a
    picture's place as a word.
    """
    out = tmp_path / "model"
    config = shapes.Config(shape="tiny", layers=1, out=str(out), tokenizer=world["model"])
    shapes.main(config)
    model, tokenizer = load(str(out))
    found = [getattr(model.config, name) for name in ("image_token_id", "video_token_id")]
    found += [getattr(model.config, f"latent{name}_id") for name in ("_start", "", "_end")]
    assert tokenizer.convert_ids_to_tokens(found) == (
        "<|image_pad|> <|video_pad|> <|latent_start|> <|latent|> <|latent_end|>".split()
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    row = read_rows(world["data"])[0]
    batch = collate([encode(row, tokenizer, DataConfig(**TINY_DATA))], 0)
    e = model.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])
    assert model.hidden(**model_inputs(batch), latents=e)[0].isfinite().all()

    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.SHAPES["tiny"]._replace(vocabulary=20))
    with pytest.raises(SystemExit, match=f"{len(tokenizer)} tokens, but tiny has room for 20"):
        shapes.main(config)
