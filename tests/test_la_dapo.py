"""LA-DAPO: its equations by hand, and a loop that loses and hangs nothing. Whole updates are
compared with a second definition in test_twin_la_dapo.py, two ranks in test_twin_ranks.py.
"""

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_latent_decode import EOS, ROWS, shuffle, spans
from test_model import make_batch, save
from test_sft import assert_resumes, weights
from test_sft import read_log as log_of

import la_dapo
import latent_decode
import rewards
from la_dapo import adjoint_loss, clipped_surrogate, group_advantages, keep_group, kl_k3
from latent_decode import Rollout, generate, replay, token_logprobs
from model import load
from tests.conftest import TINY_DATA, changed_rows

# ---------------------------------------------------------------------------------------- equations


def test_advantages_by_hand():
    """Breaks if the std is the biased one, an unjudged rollout is counted, or a constant reward
    moves anything.
    """
    A = group_advantages([1.0, 0.0, 0.0, 1.0])  # mean 1/2, unbiased variance 1/3
    torch.testing.assert_close(A, torch.tensor([1, -1, -1, 1]) * 0.5 / (math.sqrt(1 / 3) + 1e-6))
    A = group_advantages([2.0, None, 0.0])  # mean 1, variance 2
    torch.testing.assert_close(A, torch.tensor([1, 0, -1]) / math.sqrt(2), atol=1e-6, rtol=0)
    assert group_advantages([0.3] * 5).abs().max() < 1e-6
    assert not group_advantages([0.7, None]).any() and not group_advantages([None, None]).any()


@pytest.mark.parametrize(
    "verdict, right, wrong, unjudged",
    [
        ("too hard", 0, 8, 0),
        ("kept", 1, 7, 0),
        ("kept", 7, 1, 0),
        ("too easy", 8, 0, 0),
        ("too hard", 0, 2, 6),
        ("kept", 1, 1, 6),
        ("unjudged", 1, 0, 7),
        ("too hard", 1, 9, 0),  # the bounds are strict: 1 of 10 and 9 of 10 are dropped
        ("too easy", 9, 1, 0),
    ],
)
def test_filter(verdict, right, wrong, unjudged):
    """Breaks if a group is kept without both outcomes, or an unjudged rollout counts as wrong."""
    correct = [True] * right + [False] * (wrong + unjudged)
    assert keep_group(correct, [False] * (right + wrong) + [True] * unjudged) == verdict


@pytest.mark.parametrize(
    "A, ratios, losses, slopes",
    [
        (2.0, [0.5, 1.0, 1.2, 1.5], [-1.0, -2.0, -2.4, -2.56], [-1.0, -2.0, -2.4, 0.0]),  # to 1.28
        (-2.0, [0.5, 1.0, 2.0, 5.0], [1.6, 2.0, 4.0, 6.0], [0.0, 2.0, 4.0, 0.0]),  # 0.8 and c = 3
    ],
)
def test_clipping_by_hand(A, ratios, losses, slopes):
    """Breaks if either side of the clip, or the dual clip, acts where it should not.

    Slope: d loss / d log-probability.
    """
    logp = torch.tensor(ratios).log().requires_grad_()
    loss, r = clipped_surrogate(logp, torch.zeros(4), torch.tensor(A))
    loss.sum().backward()
    for got, expected in ((loss, losses), (r, ratios), (logp.grad, slopes)):
        torch.testing.assert_close(got.detach(), torch.tensor(expected))


def test_kl_is_unbiased_and_never_negative():
    """Breaks if k3 has the sign of d wrong, because then its mean under pi is not KL(pi, ref)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    k3 = kl_k3(p.log(), q.log())
    exact = (p * (p / q).log()).sum()
    assert (k3 >= 0).all() and (p * k3).sum().item() == pytest.approx(exact.item())
    assert kl_k3(p.log(), p.log()).abs().max() == 0


def test_kl_of_a_token_that_is_far_off():
    """Breaks if one token with exp(d) out of bounds takes over the loss, or makes it infinite."""
    d = torch.tensor([-30.0, -9.0, 2.0, 3.0, 200.0])  # the second and the third are within bounds
    logp = torch.zeros_like(d).requires_grad_()
    k3 = kl_k3(logp, d)
    expected = torch.tensor([10, math.exp(-9) + 8, math.exp(2) - 3, 10, 10])
    torch.testing.assert_close(k3.detach(), expected)
    k3.sum().backward()  # dk3/dlogp = 1 - exp(d)
    slope = torch.tensor([0, 1 - math.exp(-9), 1 - math.exp(2), 0, 0])
    torch.testing.assert_close(logp.grad, slope)


def test_equal_rollouts_are_replayed_once():
    """Breaks if equal responses take a row each, or those that a judge told apart share one."""
    tokens, lengths = torch.tensor([[5, 6, 0], [5, 6, 7], [5, 6, 9], [5, 6, 7]]), [2, 3, 2, 3]
    rollout = Rollout(tokens, None, None, None, None, torch.tensor(lengths))
    parts = dict(correct=[True, True, True, False], unjudged=[False] * 4)
    group = la_dapo.Group(0, {}, rollout, [], [], parts)
    assert la_dapo.distinct(group) == [[0, 2], [1], [3]]


# ------------------------------------------------------------------------------------- the decoder


def sampled(model, tokenizer, n=6, seed=5, head=False, rows=ROWS, dtype=torch.float32, **more):
    """A shuffled model's rollouts of some prompts -> batch, Rollout."""
    batch = make_batch(tokenizer, rows, "left")
    how = dict(max_new_tokens=40, max_latents=3, top_p=0.95, temperature=0.9)
    ends = tokenizer.convert_tokens_to_ids(EOS.split())
    generator = torch.Generator().manual_seed(0)
    how.update(n=n, eos_token_id=ends, generator=generator, **more)
    return batch, generate(shuffle(model, seed, head).to(dtype), batch, **how)


def wide_rollout(model, tokenizer):
    """A float64 model with a head, and a rollout with several spans of several latents."""
    rows = [ROWS[2], ROWS[4]]
    how = dict(head=True, rows=rows, dtype=torch.float64, max_new_tokens=20, top_p=1.0)
    batch, rollout = sampled(model, tokenizer, **how)
    found = [spans(t[:n].tolist(), model.config) for t, n in zip(rollout.tokens, rollout.lengths)]
    assert any(sum(k > 1 for k in row) > 1 for row in found)
    return batch, rollout


def latents_again(model, batch, rollout, prompt_of=None):
    """The rollout with the latents that the weights make now: fixed point, after N passes exact."""
    z = rollout.latents
    for _ in range(max(len(x) for x in z)):
        fed = dataclasses.replace(rollout, latents=z)
        new = replay(model, batch, fed, 0.9, prompt_of).predicted
        z = list(new.split([len(x) for x in z]))
    return dataclasses.replace(rollout, latents=z)


def decoded_again(model, batch, rollout, A, prompt_of=None):
    """sum A log p(words) with the latents made anew by the weights as they are."""
    with torch.no_grad():
        again = latents_again(model, batch, rollout, prompt_of)
        return (A * token_logprobs(model, batch, again, 0.9, prompt_of)).sum().item()


def test_bf16_autocast(model, tokenizer, monkeypatch):
    """Breaks if a dtype does not fit where weights are fp32 and the arithmetic is bf16, as on
    CUDA by default.
    """
    monkeypatch.setattr(latent_decode, "LOGITS_AT_ONCE", 50)  # several pieces
    for merge_equal in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            how = dict(head=True, top_p=1.0, max_new_tokens=20)
            batch, rollout = sampled(model, tokenizer, n=3, merge_equal=merge_equal, **how)
            out = replay(model, batch, rollout, 0.9)
            loss = out.logprobs.sum()
            loss = loss + adjoint_loss(loss, out.predicted, out.latents, 3)
        loss.backward()
        assert out.logprobs.dtype == torch.float32 and model.lm_head.weight.grad.isfinite().all()
        assert (out.logprobs - rollout.logprobs).abs().median() < 0.1  # rounding, not another state


def test_what_saves_time_reaches_the_decoder(monkeypatch):
    """Breaks if merge_equal or cuda_graph, which change no number, is lost on its way."""
    asked = []
    answers = None, [[]] * 8, [""] * 8
    monkeypatch.setattr(la_dapo, "gather", lambda parts: None)
    monkeypatch.setattr(la_dapo, "ask", lambda *args, **how: asked.append(how) or answers)
    model = SimpleNamespace(config=SimpleNamespace(latent_start_id=1, latent_id=2))
    for merge_equal, cuda_graph in ((True, False), (False, True)):
        config = la_dapo.Config(merge_equal=merge_equal, cuda_graph=cuda_graph)
        la_dapo.roll_out(model, None, ["a sample"], 4, config)
        assert (asked[-1]["merge_equal"], asked[-1]["cuda_graph"]) == (merge_equal, cuda_graph)


# --------------------------------------------------------------------------------------------- loop


@pytest.fixture(scope="module")
def loud(world, tmp_path_factory):
    """The world's model with words that vary and many spans: rewards differ within a group, all
    answers are wrong.
    """
    model, tokenizer = load(world["model"], latent_head="linear")
    return save(shuffle(model, 4, True), tokenizer, tmp_path_factory.mktemp("loud") / "model")


SMALL = dict(
    TINY_DATA, steps=4, seed=1, groups=4, group_size=3, rollout_batch=2, max_new_tokens=12,
    max_latents=2, filter=False, workers=0, lr=1e-3, micro_batch=2, save_every=2, temperature=1.0,
    adjoint_terms=-1,
)  # fmt: skip


def settings(world, loud, out, **more):
    own = dict(model=loud, data=world["data"], out=str(out))
    return la_dapo.Config(**{**SMALL, **own, **more})


def apart(a, b):
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def test_a_straight_run_equals_a_resumed_one_bit_for_bit(world, loud, tmp_path):
    """Breaks if anything but the checkpoint (optimizer, place in the data, seeds) carries over
    from step to step, or rollouts are written twice.
    """
    config = settings(world, loud, tmp_path / "a", kl=0.0)
    assert_resumes(la_dapo.train, config)
    texts = [(tmp_path / x / "rollouts_0.jsonl").read_text() for x in ("a", "a_resumed")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 2 * 4
    assert os.path.getsize(tmp_path / "a" / "rewards.png") > 5000
    with pytest.raises(SystemExit, match="resume"):
        la_dapo.train(config)
    with pytest.raises(SystemExit, match="lambda_c"):
        la_dapo.train(dataclasses.replace(config, resume=True, lambda_c=0.3))


def test_the_reference_stays_what_it_was(world, loud, tmp_path):
    """Breaks if a run that goes on is compared with what --model leads to by then, a newer
    checkpoint of its folder, or if a run without KL asks for one.
    """
    start = tmp_path / "sft"
    shutil.copytree(loud, start / "step_000002")
    config = settings(world, str(start), tmp_path / "a", steps=2, save_every=1, kl=0.05)
    without = dataclasses.replace(config, out=str(tmp_path / "b"), kl=0.0)
    la_dapo.train(without)
    straight = weights(la_dapo.train(config))
    kl = [line["kl"] for line in log_of(config.out)]
    config, without = (dataclasses.replace(c, resume=True) for c in (config, without))
    for c in (config, without):
        shutil.rmtree(os.path.join(c.out, "step_000002"))
    shutil.copytree(world["model"], start / "step_000003")
    resumed = weights(la_dapo.train(config))
    assert kl[1] > 0 and [line["kl"] for line in log_of(config.out)] == kl
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    shutil.rmtree(start)
    assert la_dapo.train(without).endswith("step_000002")


@pytest.mark.parametrize("passes", [dict(), dict(minibatches=2, inner_epochs=3)])
def test_the_decoders_record_does_not_enter_the_ratio(world, loud, tmp_path, monkeypatch, passes):
    """Breaks if an update compares with what the decoder recorded, whose kernels round otherwise:
    here by as much as 0.1. Or if this difference is not logged.
    """
    how = dict(steps=1, lr=2e-2, adjoint_terms=0, **passes)
    first = la_dapo.train(settings(world, loud, tmp_path / "a", **how))
    roll_out = la_dapo.roll_out

    def rounded(*args):
        groups = roll_out(*args)
        for group in groups:
            group.rollout.logprobs += 0.1
        return groups

    monkeypatch.setattr(la_dapo, "roll_out", rounded)
    second = la_dapo.train(settings(world, loud, tmp_path / "b", **how))
    assert all(map(torch.equal, weights(first).values(), weights(second).values()))
    (a,), (b,) = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert (a["ratio"], a["clip_fraction"]) == (b["ratio"], b["clip_fraction"])
    assert passes or (a["replay_rms"] < 1e-4 and b["replay_rms"] == pytest.approx(0.1, abs=1e-3))


def test_no_group_kept(world, loud, tmp_path):
    """Breaks if a step without a usable group (all answers are wrong) stops the run, tries for
    ever, or moves a weight.
    """
    more = dict(filter=True, max_tries=3, steps=2, kl=0.1)
    done = la_dapo.train(settings(world, loud, tmp_path, **more))
    assert apart(weights(done), weights(loud)) == 0
    for i, line in enumerate(log_of(tmp_path)):
        assert (line["groups"], line["kept"], line["too_hard"], line["updates"]) == (0, 0, 12, 0)
        assert "ratio" not in line and line["grad_norm"] is None
        # three tries of four prompts
        assert line["prompts"] == [12 * i, 12 * i + 12] and line["rollouts"] == 36


def test_a_gradient_that_is_not_finite(world, loud, tmp_path, monkeypatch):
    """Breaks if one bad step spoils the weights, or passes without a word in the log."""
    exact, factors = la_dapo.adjoint_loss, iter([math.nan] + [1] * 9)
    monkeypatch.setattr(la_dapo, "adjoint_loss", lambda *args: exact(*args) * next(factors))
    done = weights(la_dapo.train(settings(world, loud, tmp_path, steps=2)))
    assert [line["updates_skipped"] for line in log_of(tmp_path)] == [1, 0]
    assert all(v.isfinite().all() for v in done.values()) and apart(done, weights(loud)) > 1e-4


class FakeJudge:
    """Rewards.Judge's interface: what it is asked, and a verdict from the answer.

    One failure a call.
    """

    def __init__(self, verdict):
        self.verdict, self.asked, self.failures = verdict, [], Counter()

    def __call__(self, items):
        self.asked += items
        self.failures["down"] += 1
        return [self.verdict(answer) for _, _, answer in items]


def test_unjudged_rollouts_leave_the_group(world, loud, tmp_path, monkeypatch):
    """Breaks if a judge's silence counts as wrong, or stops the run when it is all there is."""
    monkeypatch.setattr(rewards, "needs_judge", lambda *a: True)
    monkeypatch.setattr(rewards, "answer_of", lambda text: text)
    monkeypatch.setattr(la_dapo, "judge_of", lambda config: FakeJudge(lambda answer: None))
    more = dict(judge_model="m", steps=2, max_tries=2)
    done = la_dapo.train(settings(world, loud, tmp_path, **more))
    assert apart(weights(done), weights(loud)) == 0
    for line in log_of(tmp_path):
        assert (line["unjudged"], line["unjudged_groups"], line["groups"]) == (24, 8, 0)
        assert line["judge_failures"] == {"down": 2}  # of this step: two tries


def ten_rows(world, name, broken):
    """A copy of the first ten rows; those named have clips that are not there."""
    missing = dict(video="clips/missing.mp4")
    return changed_rows(world, name, lambda i, row: i in broken and row.update(missing), 10)


def test_surplus_and_broken_clips(world, loud, tmp_path):
    """Breaks if a clip that cannot be read is lost without its name, surplus groups are trained on,
    or the order of the data is not each prompt once an epoch.
    """
    data = ten_rows(world, "ten.jsonl", broken=[3])
    more = dict(data=data, steps=3, groups=3, rollout_batch=2, prompts=4, save_every=1)
    la_dapo.train(settings(world, loud, tmp_path, **more))
    lines = log_of(tmp_path)
    skipped = [name for line in lines for name, _ in line["skipped_names"]]
    readable = 12 - len(skipped)
    assert set(skipped) == {f"{data}:3"}
    assert sum(line["rollouts"] for line in lines) == 3 * readable
    assert sum(line["groups"] + line["surplus"] for line in lines) == readable
    assert all(line["groups"] <= 3 for line in lines)
    ids = [json.loads(line)["id"] for line in open(tmp_path / "rollouts_0.jsonl")]
    assert len(set(ids)) == 9  # all ten prompts came by, one of them is broken


def test_an_epoch_counts_updates_and_refills_wrap(world, loud, tmp_path):
    """Breaks if refills eat up the epoch: one epoch is N // groups updates, as official counts.

    Ten prompts, no group is ever kept (all answers are wrong), so each step costs max_tries passes.
    """
    data = ten_rows(world, "epoch.jsonl", broken=[])
    more = dict(data=data, steps=0, groups=3, prompts=4, max_tries=3, filter=True, final_lr=0.1)
    la_dapo.train(settings(world, loud, tmp_path / "a", **more))
    lines = log_of(tmp_path / "a")
    assert [line["prompts"] for line in lines] == [[0, 12], [12, 24], [24, 36]]
    # final_lr needs no --steps
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    few = settings(world, loud, tmp_path / "b", **dict(more, groups=40, prompts=2, max_tries=1))
    la_dapo.train(few)
    assert len(log_of(tmp_path / "b")) == 1  # at least one


def test_an_answer_that_is_no_option_is_named_and_left_out(world, loud, tmp_path, capsys):
    """Breaks if one bad record ends a run, is learnt from, or is lost unnamed, if a file full of
    them trains all the same, or if open answers without a judge are learnt from unsaid.
    """

    def change(i, row):
        if i == 5:
            row.update(answer="purple")
        elif i > 18:
            row.pop("options")

    data = changed_rows(world, "odd.jsonl", change)
    more = dict(data=data, steps=1, groups=24, rollout_batch=8, max_tries=1)
    la_dapo.train(settings(world, loud, tmp_path / "a", **more))
    out = capsys.readouterr().out
    assert f"{data}:5" in out and "5 open answers judged by exact match alone" in out
    ids = [json.loads(line)["id"] for line in open(tmp_path / "a" / "rollouts_0.jsonl")]
    bad = json.loads(open(data).read().splitlines()[5])["id"]
    assert bad not in ids and len(ids) == 24 and len(set(ids)) == 23  # the first row came twice

    changed_rows(world, "odd.jsonl", lambda i, row: i < 5 and row.update(answer="purple"))
    with pytest.raises(SystemExit, match="'purple' is none of"):
        la_dapo.train(settings(world, loud, tmp_path / "b", **more))


def test_nothing_readable_ends_the_run(world, loud, tmp_path):
    """Breaks if a wrong media_root trains for hours on nothing."""
    data = ten_rows(world, "none.jsonl", broken=range(10))
    with pytest.raises(SystemExit, match="no such file"):
        la_dapo.train(settings(world, loud, tmp_path / "b", data=data, steps=0, groups=4))
    with pytest.raises(SystemExit, match="nothing to train on"):
        la_dapo.train(settings(world, loud, tmp_path / "c", data=data, steps=0, epochs=0.0))


@pytest.mark.parametrize(
    "name, value",
    [("temperature", 0.0), ("adjoint_terms", -2), ("prompts", -1), ("steps", -1), ("tau", 0.0)]
    + [("groups", 0), ("group_size", 1), ("judge_url", "http://x"), ("merge_equal", True)],
)
def test_bad_settings_are_refused(name, value):
    """Breaks if a setting without meaning runs, or is refused without its name."""
    with pytest.raises(ValueError, match=name):
        la_dapo.Config(**{"cuda_graph": True, name: value})
