"""On-policy distillation: its equations by enumeration, what the teacher reads, the loop."""

import dataclasses
import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_la_dapo import log_of, weights
from test_la_dapo import settings as rl_settings

import la_dapo
from common.cli import parse_config
from common.formats import RecordError, read_rows
from common.run import fingerprint
from data import collate, encode, model_inputs
from la_dapo import clipped_surrogate
from latent_decode import replay
from model import load
from tests.conftest import flags
from toy import tiny
from variants import opd
from variants.cue_recovery import Model
from variants.noisy_latents import each_alone
from variants.opd import Config, advantages, token_weights

HINTS = ("moves right", "red blue", "", "moves left up")  # of the first four rows; one has none


def settings(world, loud, out, **more):
    """la_dapo's of its tests, as far as they are opd's too."""
    names = {field.name for field in dataclasses.fields(Config)}
    shared = vars(rl_settings(world, loud, out))
    shared = {k: v for k, v in shared.items() if k in names}
    shared.update(group_size=2, prompts=4, temperature=0.9, marker="where is the ball ?")
    shared.update(adjoint_terms=0)
    return Config(**{**shared, **more})


def with_hint(row, privilege):
    """A row whose question ends as the teacher's does."""
    said = opd.hint(row, Config(privilege=privilege, marker="where is the ball ?"))
    return dataclasses.replace(row, prompt=[*row.prompt, said]) if said else row


def rows_with_cues(world):
    rows = read_rows(world["data"])
    return [opd.Cued(**vars(row), cue=HINTS[i % 4]) for i, row in enumerate(rows)]


class Pair(NamedTuple):
    """Who learns from whom."""

    model: torch.nn.Module
    tokenizer: object
    teacher: torch.nn.Module


def rolled_out(world, loud, config):
    """-> Pair, the Batch of four prompts with their rollouts, made as the loop makes it."""
    (model, tokenizer), (teacher, _) = load(loud), load(loud)
    for m in (model, teacher):  # with more spans
        with torch.no_grad():
            m.lm_head.weight[m.config.latent_start_id] *= -1.5
    pair = Pair(model.eval(), tokenizer, teacher.eval().requires_grad_(False))
    samples = [encode(row, tokenizer, config, train=False) for row in rows_with_cues(world)[:4]]
    groups = la_dapo.roll_out(pair.model, tokenizer, samples[:2], 0, config)
    groups += la_dapo.roll_out(pair.model, tokenizer, samples[2:], 1, config)
    for group in groups:
        group.parts = dict(unjudged=[False] * config.group_size)
        group.A = torch.zeros(config.group_size)
    return pair, la_dapo.batch_of(groups, torch.device("cpu"), each_alone)


def loss_of(pair, batch, config):
    """-> L of one batch that is the whole step, the figures."""
    sampled = batch.rollout.sampled
    told = opd.ask_teacher(pair.teacher, pair.tokenizer, batch, config)
    weight = token_weights(sampled, len(sampled))
    size = told.predicted.square().sum().item()
    return opd.opd_loss(pair.model, batch, told, weight, size, config)


# ---------------------------------------------------------------------------------------- equations


def test_two_decisions_by_enumeration():
    """Breaks if A has another sign, or L's mean over all responses is not the mean of the stepwise
    KLs with the visited states held constant. (So it is not the gradient of KL(p(y), p_T(y)): a
    term is missing.)
    """
    torch.manual_seed(1)
    theta = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)  # of each state: "", 0, 1, 2
    logq = torch.randn(4, 3).double().log_softmax(-1)
    logp = theta.log_softmax(-1)
    y = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2) all responses
    state = torch.stack([torch.zeros(9, dtype=torch.long), 1 + y[:, 0]], 1)
    chosen, teacher = logp[state, y], logq[state, y]  # (9, 2)
    each, _ = clipped_surrogate(chosen, chosen.detach(), advantages(teacher, chosen), 0.2, 0.2)
    p_y = chosen.sum(1, keepdim=True).exp().detach()
    weight = token_weights(torch.ones(9, 2, dtype=torch.bool), 9)
    (gradient,) = torch.autograd.grad((9 * p_y * weight * each).sum(), theta, retain_graph=True)

    kl = (logp.exp() * (logp - logq)).sum(-1)  # (4,) of each state
    visited = torch.cat([torch.ones(1), logp[0].exp()])
    (expected,) = torch.autograd.grad((visited.detach() * kl).sum() / 2, theta, retain_graph=True)
    (whole,) = torch.autograd.grad((visited * kl).sum() / 2, theta)
    torch.testing.assert_close(gradient, expected)
    assert (gradient - whole).abs().max() > 0.01


def test_advantages_by_hand():
    """Breaks if the clamp is missing on a side, or elsewhere than at 10."""
    A = advantages(torch.tensor([-1.0, -30.0, -0.5]), torch.tensor([-3.0, -2.0, -25.0]))
    assert A.tolist() == [2.0, -10.0, 10.0]


# ---------------------------------------------------------------------------- what the teacher sees


def test_a_hint_is_put_into_the_prompt(world, loud):
    """Breaks if it is not where SFT of a teacher reads it, or a token is lost."""
    _, tokenizer = load(loud)
    config = settings(world, loud, "unused")
    for row in rows_with_cues(world)[:4]:
        for privilege in ("cue", "answer", "none"):
            c = dataclasses.replace(config, privilege=privilege)
            plain = encode(row, tokenizer, c, train=False)
            asked = encode(with_hint(row, privilege), tokenizer, c, train=False)["ids"]
            assert opd.hinted(plain, tokenizer, c)["ids"] == asked
            text = dict(cue=row.cue, answer=row.answer, none="")[privilege]
            words = f"{c.marker} {text} <|im_end|>" if text else "? <|im_end|>"
            assert words in tokenizer.decode(asked)
            assert "red blue" not in tokenizer.decode(plain["ids"])


def test_a_record_carries_its_cue(tmp_path):
    """Breaks if a cue is lost or another record's, or something else is taken for one."""
    record, path = dict(problem="which ?", answer="red", videos=["a.mp4"]), tmp_path / "r.json"

    def cues(*records):
        path.write_text(json.dumps(records))
        return [row.cue for row in opd.with_cues(read_rows(str(path), bad=[]), str(path))]

    assert cues(dict(record, cue="left"), dict(cue="no row"), dict(record, cue=None), record) == [
        "left",
        "",
        "",
    ]
    assert cues(dict(cue="no row"), dict(record, cue="up")) == ["up"]
    up, down = (opd.Cued("f:0", "0", ["which ?"], [], "red", cue=cue) for cue in ("up", "down"))
    assert fingerprint([up]) != fingerprint([down])  # a run is not continued with other cues
    with pytest.raises(RecordError, match="r.json:0: 'cue' should be text, found \\['left'\\]"):
        cues(dict(record, cue=["left"]))


# --------------------------------------------------------------------------------------------- loss


def test_a_teacher_that_is_the_student_teaches_nothing(world, loud):
    """Breaks if A is not 0, bitwise, where teacher and student read the same."""
    config = settings(world, loud, "unused", privilege="none", adjoint_terms=-1, lam=1.0)
    pair, batch = rolled_out(world, loud, config)
    loss, figures = loss_of(pair, batch, config)
    assert loss == 0 and figures["gap"] == 0 == figures["latent"] and figures["entropy"] > 0.1
    gradients = torch.autograd.grad(loss, list(pair.model.parameters()), allow_unused=True)
    assert sum(g is not None for g in gradients) > 20
    assert not any(g.any() for g in gradients if g is not None)


def test_the_loss_by_hand(world, loud):
    """Breaks if L is not - sum weight A log p in its gradient, with A held constant; if a forced
    token or padding counts, or a long response counts more than a short one; or if `adjoint_terms`
    is not heard: without it nothing trains the latent head.
    """
    config = settings(world, loud, "unused")
    pair, batch = rolled_out(world, loud, config)
    loss, figures = loss_of(pair, batch, config)
    (gradient,) = torch.autograd.grad(loss, pair.model.lm_head.weight)

    told = opd.ask_teacher(pair.teacher, pair.tokenizer, batch, config)
    logp = la_dapo.replayed(pair.model, batch, config).logprobs
    sampled, A = batch.rollout.sampled, (told.logprobs - logp).detach().clamp(-10, 10)
    share = sampled / sampled.sum(1, keepdim=True) / len(sampled)
    (expected,) = torch.autograd.grad(-(share * A * logp).sum(), pair.model.lm_head.weight)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-4)
    assert figures["gap"].item() == pytest.approx((share * A).sum().item(), rel=1e-5)
    assert loss.item() == pytest.approx(-figures["gap"].item(), rel=1e-5)
    assert figures["gap"].abs() > 0.01 and len({*sampled.sum(1).tolist()}) > 1

    bias = pair.model.latent_head.bias
    loss, _ = loss_of(pair, batch, config)
    assert torch.autograd.grad(loss, bias, allow_unused=True)[0] is None
    loss, _ = loss_of(pair, batch, dataclasses.replace(config, adjoint_terms=-1))
    assert torch.autograd.grad(loss, bias)[0].abs().max() > 1e-6


def test_the_clip_acts_on_later_updates(world, loud):
    """Breaks if several updates a step have no clip, or clip at other bounds than eps: the student
    has moved from its record by .4 either way, and A is 1 or -1 by turns.
    """
    config = settings(world, loud, "unused", inner_epochs=2, eps=0.3)
    pair, batch = rolled_out(world, loud, config)
    with torch.no_grad():
        new = la_dapo.replayed(pair.model, batch, config).logprobs
    sampled = batch.rollout.sampled
    shift = torch.tensor([0.4, -0.4, 0.4, -0.4]).repeat(2)[:, None] * sampled
    A = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(2)[:, None] * sampled
    batch.rollout = dataclasses.replace(batch.rollout, logprobs=new - shift)
    told = opd.ask_teacher(pair.teacher, pair.tokenizer, batch, config)
    told = dataclasses.replace(told, logprobs=batch.rollout.logprobs + A)
    weight = sampled / sampled.sum()
    loss, _ = opd.opd_loss(pair.model, batch, told, weight, 1.0, config)
    expected, n = 0.0, sampled.sum(1)
    for row, (a, r) in enumerate(zip([1, 1, -1, -1] * 2, [np.exp(0.4), np.exp(-0.4)] * 4)):
        expected += max(-r * a, -np.clip(r, 0.7, 1.3) * a) * n[row].item()
    assert loss.item() == pytest.approx(expected / n.sum().item(), rel=1e-4)


def test_the_distance_of_the_latents_by_hand(world, loud):
    """Breaks if the teacher scores under another prompt than its own, hint and all; if `lam` pulls
    towards other latents than those that it would imagine there, or is no relative error; or
    without `lam`.
    """
    config = settings(world, loud, "unused", lam=0.7)
    pair, batch = rolled_out(world, loud, config)
    plain, _ = loss_of(pair, batch, dataclasses.replace(config, lam=0.0))
    loss, figures = loss_of(pair, batch, config)
    replays, rows = [], rows_with_cues(world)[:4]
    for who, privilege in ((pair.model, "none"), (pair.teacher, "cue")):
        asked = [with_hint(row, privilege) for row in rows]
        samples = [encode(row, pair.tokenizer, config, train=False) for row in asked]
        prompts = model_inputs(collate(samples, 0, "left"))
        with torch.no_grad():
            replays.append(replay(who, prompts, batch.rollout, config.temperature))
    told = opd.ask_teacher(pair.teacher, pair.tokenizer, batch, config)
    torch.testing.assert_close(told.logprobs, replays[1].logprobs, atol=1e-5, rtol=0)
    assert (told.logprobs - replays[0].logprobs).abs().max() > 0.1

    z, z_teacher = (who.predicted.double() for who in replays)
    assert len(z) > 10
    error = (((z - z_teacher) ** 2).sum() / (z_teacher**2).sum()).item()
    assert error > 1e-3 and figures["latent"].item() == pytest.approx(error, rel=1e-3)
    assert (loss - plain).item() == pytest.approx(0.7 * error, rel=1e-3)
    (gradient,) = torch.autograd.grad(loss, pair.model.latent_head.bias)
    assert gradient.abs().max() > 1e-5


# --------------------------------------------------------------------------------------------- loop


def cued_file(world, tmp_path):
    """The world's rows with cues, as a file."""
    path = tmp_path / "cues.jsonl"
    with open(world["data"]) as f, open(path, "w") as out:
        for i, line in enumerate(f):
            out.write(json.dumps(dict(json.loads(line), cue=HINTS[i % 4])) + "\n")
    return str(path)


def test_two_steps_by_the_command_line(world, loud, tmp_path):
    """Breaks if the variant does not train, the size of a micro-batch matters, layers that are run
    again in the backward are run without their look, or a run that goes on is another than one that
    was not cut.
    """
    more = dict(data=cued_file(world, tmp_path), media_root=world["folder"] + "/data")
    more.update(steps=2, save_every=1, recovery=True, lam=0.5, micro_batch=4)
    config = parse_config(Config, flags(settings(world, loud, tmp_path / "a", **more)))
    straight = weights(opd.train(config))
    other = dict(micro_batch=1, gradient_checkpointing=True, out=str(tmp_path / "b"))
    opd.train(dataclasses.replace(config, **other))
    lines = [log_of(tmp_path / x) for x in "ab"]
    for name in ("grad_norm", "gap", "latent", "loss"):
        assert lines[0][1][name] == pytest.approx(lines[1][1][name], rel=1e-3)
    assert abs(lines[0][0]["gap"]) > 0.01 and lines[0][0]["grad_norm"] > 1e-3

    shutil.rmtree(tmp_path / "a" / "step_000002")
    resumed = weights(opd.train(dataclasses.replace(config, resume=True)))
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert straight["recovery.looks.0.o.weight"].any()
    again, _ = load(str(tmp_path / "a" / "step_000002"), cls=Model)
    assert torch.equal(again.recovery.looks[0].o.weight, straight["recovery.looks.0.o.weight"])


def test_what_is_refused(world, loud, tmp_path):
    """Breaks if a run starts that has nothing to learn from, or with a teacher that cannot read."""
    config = settings(world, loud, tmp_path / "a", steps=1)
    with pytest.raises(SystemExit, match="24 rows, 0 with a hint"):
        opd.train(config)
    tokenizer = tiny.make_tokenizer(["another vocabulary"])
    tiny.make_model(tokenizer, 0).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    other = dataclasses.replace(config, privilege="answer", teacher=str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="the student's hidden size and its tokenizer"):
        opd.train(other)
    for bad in (dict(privilege="hint"), dict(temperature=0.0)):
        with pytest.raises(ValueError, match="expected"):
            Config(**bad)
