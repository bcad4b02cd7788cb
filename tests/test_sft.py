"""Eq. (1)-(3) by hand, and the training loop: schedule, order, exact sums over micro-batches and
ranks, resume, skips.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_model import IMAGE, ROWS, SPAN, log_softmax, make_batch

import sft
from common.folder import checkpoints
from model import load
from toy import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = dict(tiny.settings("sft"), global_batch=8, micro_batch=4, workers=0)


def settings(world, out, cls=sft.Config, **more):
    return cls(
        **{
            **SMALL,
            "model": world["model"],
            "data": world["data"],
            "out": str(out),
            "steps": 4,
            **more,
        }
    )


def weights(checkpoint):
    return load_file(os.path.join(checkpoint, "model.safetensors"))


def read_log(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


@pytest.fixture
def sample(model, tokenizer):
    """Two rows as in training: batch, labels from the words after `?` on but not `<|latent|>`,
    five latents.
    """
    batch = make_batch(
        tokenizer,
        [
            ["which", IMAGE, "?", SPAN, "hits red", SPAN.replace("<|latent|> ", "", 1), "blue"],
            ["which wall ?", SPAN, "up"],
        ],
    )
    ids, labels = batch["input_ids"], batch["input_ids"].clone()
    labels[(ids == model.config.latent_id) | (batch["attention_mask"] == 0)] = -100
    for row, after in zip(
        labels, (ids == tokenizer.convert_tokens_to_ids("?")).int().argmax(1).tolist()
    ):
        row[: after + 1] = -100
    assert (labels != -100).sum().tolist() == 7 + 3
    torch.manual_seed(1)
    return dict(batch=batch, labels=labels, latents=torch.randn(5, 96))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["mse", "nmse"])
def test_loss_by_hand(model, sample, kind, head):
    """Eq. (1)-(3). Breaks if the mean, the state compared, the labels' shift, the order or the
    weights are wrong.
    """
    if head:
        model.add_latent_head()
        torch.nn.init.normal_(model.latent_head.weight, std=0.1)
        torch.nn.init.normal_(model.latent_head.bias)
    args = dict(**sample["batch"], latents=sample["latents"], labels=sample["labels"])
    out, e = model(**sample["batch"], latents=sample["latents"]), sample["latents"].numpy()
    h, logp, ce, z, go = (
        model.to_latent(out.hidden_states[-1]).detach().numpy(),
        log_softmax(out.logits),
        [],
        [],
        [],
    )
    for r, row in enumerate(sample["batch"]["input_ids"].tolist()):  # t is predicted at t - 1
        for t in range(1, len(row)):
            if sample["labels"][r, t] != -100:
                ce.append(-logp[r, t - 1, row[t]])
            if row[t] == model.config.latent_id:
                z.append(h[r, t - 1])
                go.append(-np.log(1 - np.exp(logp[r, t - 1, model.config.latent_end_id])))
    ce, z, go = np.array(ce), np.array(z), np.array(go)
    distance = ((z - e) ** 2).mean(1) / (2.5 if kind == "nmse" else 1)
    args.update(lam=0.3, latent_var=2.5 if kind == "nmse" else 1.0)

    def check(got, words, n_text):
        assert (got["n_text"], got["n_latent"]) == (n_text, 5)
        for key, value in dict(
            ce_sum=words,
            ce=words / n_text,
            latent_sum=distance.sum(),
            latent=distance.mean(),
            loss=words / n_text + 0.3 * distance.mean(),
        ).items():
            assert got[key].item() == pytest.approx(value, rel=1e-5), key

    got = sft.sft_loss(model, **args)
    check(got, ce.sum(), 10)
    check(sft.sft_loss(model, **args, stop_term=True), ce.sum() + go.sum(), 10 + 5)
    assert go.sum() > 1e-3

    at_t = h[sample["batch"]["input_ids"].numpy() == model.config.latent_id]
    assert (
        abs(((at_t - e) ** 2).mean() - ((z - e) ** 2).mean()) > 1e-3
    )  # the state *at* t would be another number
    for order in (
        [1, 0, 2, 3, 4],
        [4, 0, 1, 2, 3],
    ):  # two frames swapped; all of them one position off
        off = sft.sft_loss(model, **args, targets=sample["latents"][order])
        assert off["ce"] == got["ce"] and abs(off["latent"] - got["latent"]) > 1e-4


def test_batch_without_latents(model, tokenizer):
    """Breaks if a text-only batch gives NaN, or leaves the head without a gradient (DDP would
    hang).
    """
    model.add_latent_head()
    batch = make_batch(tokenizer, ROWS["images"])
    got = sft.sft_loss(model, **batch, labels=batch["input_ids"], latent_var=2.0, stop_term=True)
    assert (
        got["latent"] == 0
        and got["n_latent"] == 0
        and got["loss"] == got["ce"]
        and torch.isfinite(got["loss"])
    )
    got["loss"].backward()
    assert not model.latent_head.weight.grad.any() and not model.latent_head.bias.grad.any()


def test_gradient_reaches_the_states_and_not_the_targets(model, sample):
    """Breaks if Eq. (3) trains nothing, or trains the target to come to the state."""
    targets = torch.randn(5, 96, requires_grad=True)
    args = dict(
        **sample["batch"], latents=sample["latents"], labels=sample["labels"], targets=targets
    )
    got = sft.sft_loss(model, **args)
    got["latent"].backward()
    assert targets.grad is None
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads["lm_head.weight"] is None  # Eq. (3) has no words in it
    assert all(g.abs().sum() > 0 for name, g in grads.items() if "language_model" in name)
    assert got["latent"].item() == pytest.approx(
        sft.sft_loss(model, **{**args, "targets": targets + 0})["latent"].item()
    )


def test_learning_rate_by_hand():
    """Breaks if warm-up is not linear to the peak, or the cosine does not go through half and to
    zero.
    """
    c = sft.Config(lr=2.0, warmup=0.1)
    rates = [sft.learning_rate(s, 110, c) for s in range(110)]
    assert (
        rates[0] == pytest.approx(2 / 11)
        and rates[10] == pytest.approx(2.0)
        and max(rates) == pytest.approx(2.0)
    )
    assert rates[11] == pytest.approx(2.0)  # 99 cosine steps from here
    assert rates[11 + 33] == pytest.approx(1 + math.cos(math.pi / 3)) and 0 < rates[-1] < 0.001


def test_every_epoch_is_a_permutation_and_ranks_share_it():
    """Breaks if a sample is lost or doubled within an epoch, or if the number of ranks changes
    what a step sees.
    """
    order = sft.sample_order(10, 25, seed=3)
    assert (
        sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    )
    assert order == sft.sample_order(10, 25, seed=3) != sft.sample_order(10, 25, seed=4)
    for world in (1, 2, 3):
        plans = [list(sft.micro_batches(order, 1, 4, 8, 2, r, world)) for r in range(world)]
        assert len({len(p) for p in plans}) == 1  # the same number of forwards on each rank
        count = len(plans[0]) // 3
        for step in range(1, 4):
            seen = [
                i for p in plans for batch in p[(step - 1) * count : step * count] for i in batch
            ]
            assert sorted(seen) == sorted(order[step * 8 : step * 8 + 8])


def assert_resumes(train, config):
    """A straight run of 4 steps, and one resumed after 2, have the same weights and log lines."""
    straight = train(config)
    other = config.out + "_resumed"
    shutil.copytree(config.out, other)
    shutil.rmtree(os.path.join(other, "step_000004"))
    resumed = train(dataclasses.replace(config, out=other, resume=True))
    a, b, half = map(weights, (straight, resumed, os.path.join(config.out, "step_000002")))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], half[k]) for k in a)
    states = [
        torch.load(os.path.join(done, "trainer", "rank_0.pt"), weights_only=True)["random"]
        for done in (straight, resumed)
    ]
    for name, state in states[0].items():  # whoever draws next draws the same
        other_state = states[1][name]
        assert torch.equal(state, other_state) if name == "torch" else state == other_state, name
    lines = [[dict(line, seconds=0) for line in read_log(out)] for out in (config.out, other)]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_a_straight_run_equals_a_resumed_one_bit_for_bit(world, tmp_path):
    """Breaks if anything that decides the weights is missing from the checkpoint: order, Adam
    state, step.
    """
    assert_resumes(sft.train, settings(world, tmp_path / "a", save_every=2))


def test_killed_while_saving_leaves_the_older_checkpoint(world, tmp_path, monkeypatch):
    """Breaks if a half-written checkpoint can be taken for a whole one."""
    real = torch.save

    def dies(what, path, *rest):
        if what.get("step") == 4 and "optimizer" in what:
            with open(path, "wb") as f:
                f.write(b"half")
            raise KeyboardInterrupt
        return real(what, path, *rest)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        sft.train(settings(world, tmp_path / "a", save_every=2))
    monkeypatch.undo()
    assert [os.path.basename(p) for p in checkpoints(str(tmp_path / "a"))] == ["step_000002"]
    done = sft.train(settings(world, tmp_path / "a", save_every=2, resume=True))
    straight = sft.train(settings(world, tmp_path / "b", save_every=2))
    a, b = weights(done), weights(straight)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_of_a_finished_run_does_nothing_and_a_used_folder_is_refused(world, tmp_path):
    """Breaks if a second run in the same folder overwrites the first, or other settings are
    resumed silently.
    """
    done = sft.train(settings(world, tmp_path, steps=1))
    before = os.stat(os.path.join(done, "model.safetensors")).st_mtime_ns
    assert sft.train(settings(world, tmp_path, steps=1, resume=True)) == done
    assert os.stat(os.path.join(done, "model.safetensors")).st_mtime_ns == before
    with pytest.raises(SystemExit, match="already holds step_000001"):
        sft.train(settings(world, tmp_path, steps=1))
    with pytest.raises(SystemExit, match="other values of lam"):
        sft.train(settings(world, tmp_path, steps=1, lam=0.7, resume=True))
    with pytest.raises(SystemExit, match="--data is missing"):
        sft.train(settings(world, tmp_path / "new", data=""))
    with pytest.raises(SystemExit, match="nothing to train on: 24 rows, 0.0 epochs"):
        sft.train(settings(world, tmp_path / "new", steps=0, epochs=0.0))
    with pytest.raises(ValueError, match="expected mse or nmse"):
        settings(world, tmp_path / "new", latent_loss="l1")
    with pytest.raises(ValueError, match="micro_batch is 0, expected at least 1"):
        settings(world, tmp_path / "new", micro_batch=0)


def test_a_step_without_a_readable_sample_ends_the_run(world, tmp_path):
    """Breaks if a wrong media_root trains for hours on nothing."""
    with pytest.raises(SystemExit, match="no sample of step 0 could be used, e.g. .*no such file"):
        sft.train(settings(world, tmp_path / "a", media_root=str(tmp_path), latent_loss="mse"))
    with pytest.raises(SystemExit, match="none of the first 64 samples"):
        sft.train(settings(world, tmp_path / "b", media_root=str(tmp_path)))


def test_a_later_step_without_a_readable_sample_is_logged_and_skipped(world, tmp_path, capsys):
    """Breaks if rotten clips in the middle of a run, or where it is resumed, end it, or are lost
    without a name.
    """
    with open(world["data"]) as f:
        rows = [json.loads(line) for line in f]
    order = sft.sample_order(len(rows), 5, 0)
    for k in (1, 3):
        rows[order[k]]["video"] = "clips/missing.mp4"
    data = os.path.join(os.path.dirname(world["data"]), "rotten.jsonl")
    with open(data, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    more = dict(data=data, steps=5, global_batch=1, micro_batch=1, save_every=3)
    done = sft.train(settings(world, tmp_path / "a", **more))
    log = read_log(tmp_path / "a")
    assert "step 1: no sample could be used, no update" in capsys.readouterr().out
    assert [line["update_skipped"] for line in log] == [False, True, False, True, False]
    assert log[1]["ce"] is None and log[1]["skipped"][0][0] == f"{data}:{order[1]}"
    assert done.endswith("step_000005")
    half, whole = weights(str(tmp_path / "a" / "step_000003")), weights(done)
    assert any(not torch.equal(half[k], whole[k]) for k in half)

    shutil.rmtree(done)  # step 3 is now the first one
    again = weights(sft.train(settings(world, tmp_path / "a", **more, resume=True)))
    assert all(torch.equal(again[k], whole[k]) for k in whole)
    resumed = read_log(tmp_path / "a")
    assert [dict(line, seconds=0) for line in resumed] == [dict(line, seconds=0) for line in log]


def test_variance_of_the_targets_by_hand(world, tmp_path):
    """Breaks if nmse divides Eq. (3) by another number than the variance, or mse by any."""
    e = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    assert sft.target_variance(e).item() == pytest.approx((8 / 3 + 2) / 2)
    lines = {}
    for kind in ("mse", "nmse"):
        done = sft.train(settings(world, tmp_path / kind, steps=1, latent_loss=kind))
        lines[kind] = read_log(tmp_path / kind)[0]
    trainer = torch.load(os.path.join(done, "trainer", "trainer.pt"), weights_only=True)
    assert lines["mse"]["latent"] / trainer["latent_var"] == pytest.approx(lines["nmse"]["latent"])
    assert trainer["latent_var"] != pytest.approx(1, abs=0.01)


# A run whose optimizer is plain gradient descent with rate 1: the weights then show the gradient
# itself.
DESCENT = """
import sys, json, torch
sys.path.insert(0, {root!r})
torch.optim.AdamW = lambda groups, **kw: torch.optim.SGD(groups, lr=1.0)
import sft
if __name__ == "__main__":
    sft.train(sft.Config(**json.loads(sys.argv[1])))
    from common.machine import leave

    leave()
"""


def descend(tmp_path, processes, config):
    script = tmp_path / "descend.py"
    script.write_text(DESCENT.format(root=ROOT))
    launch = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    )
    run = subprocess.run(
        [*launch, str(script), json.dumps(vars(config))],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return weights(checkpoints(config.out)[-1]), run.stdout + run.stderr


@pytest.mark.slow  # processes of their own
def test_micro_batches_and_two_processes_give_the_gradient_of_one_big_batch(world, tmp_path):
    """Breaks if a mean of means is taken anywhere, if DDP's mean is not undone, or if a rank
    without samples hangs.

    Five samples, one of them broken, on two ranks in micro-batches of two: the ranks hold three and
    two samples, the second rank's last micro-batch is empty.
    """
    with open(world["data"]) as f:
        rows = [json.loads(line) for line in f][:5]
    rows[3]["video"] = "clips/missing.mp4"
    broken = os.path.join(os.path.dirname(world["data"]), "five.jsonl")
    with open(broken, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    base = dict(
        data=broken,
        steps=1,
        global_batch=5,
        lr=1.0,
        clip=1e9,
        latent_loss="mse",
        lam=0.3,
        warmup=0.0,
    )
    big, _ = descend(tmp_path, 1, settings(world, tmp_path / "big", **{**base, "micro_batch": 5}))
    small, _ = descend(
        tmp_path, 1, settings(world, tmp_path / "small", **{**base, "micro_batch": 1})
    )
    two, said = descend(
        tmp_path, 2, settings(world, tmp_path / "two", **{**base, "micro_batch": 2})
    )
    start = weights(world["model"])
    moved = max((big[k] - start[k]).abs().max().item() for k in start)
    assert moved > 1e-2
    for other in (small, two):
        assert max((big[k] - other[k]).abs().max().item() for k in big) < 1e-6 * max(1, moved)
    assert f"skipped {broken}:3" in said and "missing.mp4: no such file" in said
    lines = [read_log(tmp_path / name)[0] for name in ("big", "small", "two")]
    assert [[where for where, _ in line["skipped"]] for line in lines] == [[f"{broken}:3"]] * 3
    for key in ("ce", "latent", "grad_norm"):
        assert np.allclose([line[key] for line in lines], lines[0][key], rtol=1e-5)


def test_text_only_rows_have_no_spans_and_the_vision_tower_stays(world, tmp_path):
    """Breaks if --no-spans leaves a latent in, or if frozen weights move."""
    done = sft.train(settings(world, tmp_path, spans=False, steps=2, latent_head=""))
    assert all(line["latents"] == 0 and line["latent"] == 0 for line in read_log(tmp_path))
    a, b = weights(world["model"]), weights(done)
    moved = {k for k in a if not torch.equal(a[k], b[k])}
    assert moved and not any(".visual." in k for k in moved)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_logged(world, tmp_path, monkeypatch):
    """Breaks if a NaN reaches the weights."""
    real = sft.batch_sums
    monkeypatch.setattr(sft, "batch_sums", lambda *a: [x * math.nan for x in real(*a)])
    done = sft.train(settings(world, tmp_path, steps=1))
    a, b = weights(world["model"]), weights(done)
    assert all(torch.equal(a[k], b[k]) for k in a) and read_log(tmp_path)[0]["update_skipped"]


def test_loss_falls_and_curves_are_drawn(world, tmp_path):
    """Breaks if the optimizer, the labels or the latents' alignment is wrong: then 24 rows cannot
    be learnt by heart.
    """
    done = sft.train(settings(world, tmp_path, steps=60, global_batch=24, micro_batch=24))
    log = read_log(tmp_path)
    assert log[-1]["ce"] < 0.2 * log[0]["ce"] and log[-1]["latent"] < 0.5 * log[5]["latent"]
    assert os.path.getsize(tmp_path / "loss.png") > 5000 and done.endswith("step_000060")


@pytest.mark.slow
def test_the_script_takes_a_full_vocabulary_and_shows_a_row(world, tmp_path):
    """Breaks if the command line differs from the functions, or a 151,936-word vocabulary needs
    another path.
    """
    model, tokenizer = load(world["model"])
    model.resize_token_embeddings(151936)
    model.config.text_config.vocab_size = 151936
    model.save_pretrained(tmp_path / "big")
    tokenizer.save_pretrained(tmp_path / "big")
    run = subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, "sft.py"),
            "--model",
            str(tmp_path / "big"),
            "--data",
            world["data"],
            "--out",
            str(tmp_path / "out"),
            "--steps",
            "1",
            "--global_batch",
            "2",
            "--workers",
            "1",
            "--gradient_checkpointing",
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert (
        "last checkpoint:" in run.stdout
        and "latent   '<|latent|>'" in run.stdout
        and "visual" in run.stdout
    )
    assert math.isfinite(read_log(tmp_path / "out")[0]["loss"])
