"""What was held out: its loss and accuracy by other means; a training that takes no notice."""

import dataclasses
import filecmp
import json
import os

import pytest
import torch
from test_la_dapo import FakeJudge, log_of, loud  # noqa: F401  a fixture
from test_la_dapo import settings as rl_settings
from test_sft import settings

import evaluate
import la_dapo
import sft
from common.formats import read_rows
from common.machine import Machine
from common.run import Run
from data import Samples, collate, model_inputs
from model import load
from tests.conftest import changed_rows


@pytest.fixture(scope="module")
def broken(world):
    """The world's eight test rows, the sixth without its clip -> their file."""
    missing = dict(video="clips/missing.mp4")
    rows = dict(data=world["test"])
    return changed_rows(rows, "held_out.jsonl", lambda i, row: i == 5 and row.update(missing))


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory):
    """A model that answers some of the world's 24 training rows right, and not all."""
    out = tmp_path_factory.mktemp("taught")
    return sft.train(settings(world, out, steps=35, global_batch=24, micro_batch=24, save_every=35))


def loss_of_one_batch(checkpoint, path, config):
    """`sft.sft_loss` on all rows of a file that can be read, at once."""
    model, tokenizer = load(checkpoint)
    rows = [row for i, row in enumerate(read_rows(path)) if i != 5]
    samples = Samples(rows, tokenizer, config, spans=config.spans)
    batch = collate([samples[i] for i in range(7)], 0)
    trainer = torch.load(os.path.join(checkpoint, "trainer", "trainer.pt"), weights_only=True)
    args = dict(model_inputs(batch), labels=batch["labels"], lam=config.lam)
    if config.spans:
        frames = batch["future_pixel_values"], batch["future_grid_thw"]
        args.update(latents=model.encode_frames(*frames), latent_var=trainer["latent_var"])
    with torch.no_grad():
        return sft.sft_loss(model, stop_term=config.stop_term, **args)


@pytest.mark.parametrize("spans", [True, False])
def test_the_held_out_loss_is_that_of_one_big_batch(world, broken, tmp_path, capsys, spans):
    """Breaks if a batch weighs as much as another of more tokens, the labels, the spans or the
    variance are not the training's, or a row that cannot be read is lost without a name.
    """
    more = dict(eval_data=broken, spans=spans, lam=0.3, micro_batch=3, steps=3)
    config = settings(world, tmp_path, max_bad=0.2, save_every=2, **more)
    done = sft.train(config)
    lines = log_of(tmp_path)
    assert ["eval_loss" in line for line in lines] == [False, True, True]
    for line, checkpoint in zip(lines[1:], (str(tmp_path / "step_000002"), done)):
        whole = loss_of_one_batch(checkpoint, broken, config)
        for name in ("loss", "ce", "latent"):
            assert line[f"eval_{name}"] == pytest.approx(whole[name].item(), rel=1e-5), name
        assert [where for where, _ in line["eval_skipped"]] == [f"{broken}:5"]
    assert (lines[-1]["eval_latent"] > 0) == spans and lines[-1]["eval_ce"] > 0
    assert f"skipped {broken}:5: " in capsys.readouterr().out
    with open(os.path.join(done, "future_l1.json")) as f:
        assert json.dumps(lines[-1]["eval_loss"]) in f.read()  # beside the run's last figures


def assert_the_same_training(train, config, **held_out):
    """With and without: weights, optimizer, random state, the log's other fields, bit for bit."""
    plain = train(config)
    other = dataclasses.replace(config, out=config.out + "_held_out", **held_out)
    measured = train(other)
    for name in ("model.safetensors", os.path.join("trainer", "rank_0.pt")):
        files = (os.path.join(done, name) for done in (plain, measured))
        assert filecmp.cmp(*files, shallow=False), name
    lines = []
    for out in (config.out, other.out):
        for line in log_of(out):
            kept = {k: v for k, v in line.items() if k[:5] != "eval_" and "seconds" not in k}
            lines.append(kept)
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert sum("eval_skipped" in line for line in log_of(other.out)) == len(lines) // 2


def test_training_takes_no_notice(world, loud, broken, tmp_path):  # noqa: F811
    """Breaks if a random number is drawn, a mode or a gradient left behind, or a judge's failure
    counted for the training.
    """
    held_out = dict(eval_data=broken)
    config = settings(world, tmp_path / "sft", max_bad=0.2, steps=3, save_every=1)
    assert_the_same_training(sft.train, config, **held_out)
    config = rl_settings(world, loud, tmp_path / "rl", steps=2, max_bad=0.2, save_every=1)
    assert_the_same_training(la_dapo.train, config, **held_out)


def test_the_accuracy_is_that_of_an_evaluation(world, taught, tmp_path):
    """Breaks if held-out prompts are not answered greedily, with the training's lengths, or are
    read otherwise than evaluate.py reads them.
    """
    more = dict(steps=2, lr=1e-4, eval_data=world["data"], max_new_tokens=40)
    config = rl_settings(world, taught, tmp_path / "rl", **more)
    done = la_dapo.train(config)
    first, last = log_of(tmp_path / "rl")
    assert "eval_accuracy" not in first
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(sft.DataConfig)}
    own.update(model=done, data=world["data"], max_new_tokens=40, max_latents=2, report=0)
    scores = evaluate.evaluate(evaluate.Config(out=str(tmp_path / "eval"), **own))
    assert 0 < scores["all"]["right"] < 24
    assert last["eval_accuracy"] == scores["all"]["right"] / 24


def test_open_answers_are_judged(world, tmp_path, monkeypatch):
    """Breaks if the judge is not asked, its silence counts as wrong, or its failures at what was
    held out are counted for the training.
    """
    answers = iter([f"<answer>a{i}</answer>" for i in range(100)])

    def ask(model, tokenizer, samples, **how):
        assert how == dict(max_new_tokens=12, max_latents=2)
        return None, [], [next(answers) for _ in samples]

    rows = read_rows(world["test"])
    for row in rows:
        row.options = None
    verdicts = dict(a0=True, a1=None, a2=False, a3=True)
    judge = FakeJudge(lambda answer: verdicts.get(answer, False))
    monkeypatch.setattr(la_dapo, "ask", ask)
    config = rl_settings(world, world["model"], tmp_path)
    run = Run(config, rows, Machine(), "LA-DAPO")
    line = la_dapo.held_out_accuracy(*load(world["model"]), rows, judge, run)
    assert line["eval_accuracy"] == 2 / 7 and line["eval_skipped"] == []
    assert line["eval_judge_failures"] == {"down": 2} and not judge.failures  # two batches


def test_other_rows_may_be_held_out_after_a_restart(world, loud, broken, tmp_path):  # noqa: F811
    """Breaks if a run cannot go on with other held-out rows, or a file that holds too many bad
    records is noticed late.
    """
    config = settings(world, tmp_path / "a", steps=2, save_every=1)
    sft.train(dataclasses.replace(config, eval_data=broken, max_bad=0.2))
    os.rename(tmp_path / "a" / "step_000002", tmp_path / "gone")
    more = dict(eval_data=world["test"], resume=True)
    sft.train(dataclasses.replace(config, **more))
    assert log_of(tmp_path / "a")[1]["eval_skipped"] == []
    purple = dict(answer="purple")
    rows = dict(data=world["test"])
    odd = changed_rows(rows, "odd.jsonl", lambda i, row: i == 2 and row.update(purple))
    with pytest.raises(SystemExit, match="1 of 8 records .*'purple' is none of"):
        la_dapo.train(rl_settings(world, loud, tmp_path / "c", eval_data=odd))
