"""LA-DAPO: replay, the equations by other means, the gradient through latents, and a loop that
loses and hangs nothing.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_latent_decode import EOS, ROWS, shuffle, spans
from test_model import make_batch, save
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

import la_dapo
import latent_decode
import rewards
from common.folder import checkpoints
from la_dapo import (
    Batch,
    Counts,
    adjoint_loss,
    clipped_surrogate,
    group_advantages,
    keep_group,
    kl_k3,
)
from latent_decode import generate, join, replay, take, token_logprobs
from model import load
from toy import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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
    assert not group_advantages([0.7]).any() and not group_advantages([None, None]).any()
    assert not group_advantages([0.7, None]).any()


@pytest.mark.parametrize(
    "right, unjudged, verdict",
    [
        (0, 0, "too hard"),
        (1, 0, "kept"),
        (7, 0, "kept"),
        (8, 0, "too easy"),
        (0, 6, "too hard"),
        (1, 6, "kept"),
        (1, 7, "unjudged"),
        (0, 8, "unjudged"),
    ],
)
def test_filter(right, unjudged, verdict):
    """Breaks if a group of 8 is kept without both outcomes, or an unjudged rollout counts as
    wrong.
    """
    correct = [True] * right + [False] * (8 - right)
    assert keep_group(correct, [False] * (8 - unjudged) + [True] * unjudged) == verdict


def test_filter_edges():
    """Breaks if 1 of 10 or 9 of 10 pass: the bounds are strict."""
    assert [keep_group([True] * k + [False] * (10 - k), [False] * 10) for k in (1, 2, 8, 9)] == [
        "too hard",
        "kept",
        "kept",
        "too easy",
    ]


@pytest.mark.parametrize(
    "ratio, A, loss, slope",
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),
        (1.5, 2.0, -2.56, 0.0),
        (0.5, 2.0, -1.0, -1.0),  # up: clip at 1.28
        (1.0, -2.0, 2.0, 2.0),
        (0.5, -2.0, 1.6, 0.0),
        (2.0, -2.0, 4.0, 4.0),
        (5.0, -2.0, 6.0, 0.0),
    ],
)  # down: 0.8 and 3
def test_clipping_by_hand(ratio, A, loss, slope):
    """Breaks if either side of the clip, or the dual clip, acts where it should not.

    Slope: d loss / d log-probability.
    """
    logp = torch.tensor([math.log(ratio) - 1.5], dtype=torch.float64, requires_grad=True)
    got, r = clipped_surrogate(
        logp, torch.tensor([-1.5], dtype=torch.float64), torch.tensor([A], dtype=torch.float64)
    )
    got.sum().backward()
    assert (
        got.item() == pytest.approx(loss)
        and r.item() == pytest.approx(ratio)
        and logp.grad.item() == pytest.approx(slope)
    )


def test_kl_is_unbiased_and_never_negative():
    """Breaks if k3 has the sign of d wrong: its mean under pi would not be KL(pi, ref)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    k3 = kl_k3(p.log(), q.log())
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    )
    assert (k3 >= 0).all() and (p * k3).sum().item() == pytest.approx(exact.item())
    assert kl_k3(p.log(), p.log()).abs().max() == 0


def test_kl_of_a_token_that_is_far_off():
    """Breaks if one token with exp(d) out of bounds takes over the loss, or makes it infinite.

    d = -30, -9, 2, 3, 200: the second and third are as without clamps.
    """
    d = torch.tensor([-30.0, -9.0, 2.0, 3.0, 200.0])
    logp = torch.zeros_like(d).requires_grad_()
    k3 = kl_k3(logp, d)
    torch.testing.assert_close(
        k3.detach(), torch.tensor([10, math.exp(-9) + 8, math.exp(2) - 3, 10, 10])
    )
    k3.sum().backward()  # dk3/dlogp = 1 - exp(d)
    slope = torch.tensor([0, 1 - math.exp(-9), 1 - math.exp(2), 0, 0])
    torch.testing.assert_close(logp.grad, slope)


def test_every_sampling_flag_reaches_the_decoder(monkeypatch):
    """Breaks if a flag of the rollouts is lost or exchanged on its way, or share is taken with a
    captured step.
    """
    asked = dict(temperature=0.7, top_p=0.8, max_new_tokens=11, max_latents=5, cuda_graph=True)
    asked.update(share=False)

    class Asked(Exception):
        pass

    def ask(model, tokenizer, samples, **how):
        raise Asked(how)

    monkeypatch.setattr(la_dapo, "ask", ask)
    config = la_dapo.Config(**asked, group_size=3, seed=2)
    with pytest.raises(Asked) as error:
        la_dapo.roll_out(None, None, ["a sample"], 4, config)
    (how,) = error.value.args
    assert how.pop("generator").initial_seed() == 2 * 1_000_003 + 4
    assert how == dict(asked, n=3)
    with pytest.raises(ValueError, match="captured step has one size"):
        la_dapo.Config(share=True, cuda_graph=True)


def test_learning_rate_by_hand():
    """Breaks if the warm-up is not linear, or the last step is not near final_lr."""
    c = la_dapo.Config(lr=1.0, steps=14, warmup_steps=4, final_lr=0.1)
    assert [la_dapo.learning_rate(s, c.steps, c) for s in (0, 3, 4, 7, 13)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.7, 0.1]
    )
    assert la_dapo.learning_rate(9, 100, la_dapo.Config(lr=1.0)) == 1.0


def test_figures_of_rollouts_by_hand(model, tokenizer):
    """Breaks if a deviation, a sum over ranks or a count is wrong, None counts as a value, or a
    name without values is missing from the line.
    """

    class TwoAlike:
        def gather(self, items):
            return items * 2

    _, rollout = sampled(model, tokenizer, n=1)
    G = len(rollout.tokens)
    rows = [t[:n].tolist() for t, n in zip(rollout.tokens, rollout.lengths)]
    found = [spans(row, model.config) for row in rows]
    unjudged = [True] + [False] * (G - 1)
    parts = dict(total=[None, *range(G - 1)], correct=[0] * G, unjudged=unjudged)
    group = la_dapo.Group(0, {}, rollout, [""] * G, found, parts, "kept")
    line = la_dapo.rollout_figures([group, group], [group], [group, group], TwoAlike())
    flat = [token for row in rows for token in row]
    n_spans, n_latents = sum(map(len, found)), flat.count(model.config.latent_id)
    forced = len(flat) - int(rollout.sampled.sum())
    assert line["length"] == len(flat) / G and line["spans"] == n_spans / G
    assert line["latents"] == n_latents / G and line["forced_stops"] == forced / n_spans > 0
    assert line["cut_off"] == rollout.finish.count("length") / G > 0
    assert (line["rollouts"], line["unjudged"], line["kept"]) == (4 * G, 4, 4)
    assert (line["groups"], line["surplus"], line["too_easy"]) == (2, 2, 0)
    assert line["total"] == pytest.approx(np.mean(range(G - 1)))
    assert line["total_std"] == pytest.approx(np.std(range(G - 1)))
    assert line["contrastive"] == line["contrastive_std"] == 0.0


# ------------------------------------------------------------------------------------------- replay


def sampled(
    model,
    tokenizer,
    n=6,
    seed=5,
    head=False,
    top_p=0.95,
    temperature=0.9,
    rows=ROWS,
    tokens=40,
    dtype=torch.float32,
):
    batch = make_batch(tokenizer, rows, "left")
    rollout = generate(
        shuffle(model, seed, head).to(dtype),
        batch,
        max_new_tokens=tokens,
        max_latents=3,
        n=n,
        top_p=top_p,
        temperature=temperature,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS.split()),
        generator=torch.Generator().manual_seed(0),
    )
    return batch, rollout


@pytest.mark.parametrize("head", [False, True])
def test_replay_is_exact(model, tokenizer, head):
    """Breaks if the trainer's log-probabilities are not those of the rollout: with several spans,
    early and forced stops,
    prompts of different lengths, several samples a prompt. Without the recorded latents (official)
    they must not agree."""
    batch, rollout = sampled(model, tokenizer, head=head)
    found = [spans(t[:n].tolist(), model.config) for t, n in zip(rollout.tokens, rollout.lengths)]
    lengths = {k for row in found for k in row}
    assert (
        {0, 3} <= lengths
        and lengths & {1, 2}
        and max(map(len, found)) > 2
        and len(set(rollout.lengths.tolist())) > 2
    )
    assert (batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]).any() and set(
        rollout.finish
    ) == {"eos", "length"}
    with torch.no_grad():
        again = token_logprobs(model, batch, rollout, 0.9)
        pause = model.get_input_embeddings().weight[model.config.latent_id]
        official = dataclasses.replace(
            rollout, latents=[pause.expand_as(z) for z in rollout.latents]
        )
        without = token_logprobs(model, batch, official, 0.9)
    assert again.shape == rollout.tokens.shape and not again[~rollout.sampled].any()
    torch.testing.assert_close(again, rollout.logprobs, atol=1e-4, rtol=0)
    assert (without - rollout.logprobs).abs().max() > 0.5
    assert (
        token_logprobs(model, batch, rollout, 1.0) - rollout.logprobs
    ).abs().max() > 1e-2  # the temperature matters


def test_replay_of_some_rows_in_another_order(model, tokenizer):
    """Breaks if rows are matched with the wrong prompt once groups have lost equal rollouts."""
    batch, rollout = sampled(model, tokenizer)
    rows = torch.tensor([21, 2, 9, 3, 14])
    some = join([take(rollout, rows[:2]), take(rollout, rows[2:])])
    with torch.no_grad():
        got = token_logprobs(model, batch, some, 0.9, prompt_of=rows // 6)
    expected = rollout.logprobs[rows]
    for r in range(len(rows)):
        n = int(rollout.lengths[rows[r]])
        torch.testing.assert_close(got[r, :n], expected[r, :n], atol=1e-4, rtol=0)
        assert not got[r, n:].any()


def test_stop_and_continue_sum_to_one(model, tokenizer):
    """Breaks if the two outcomes of a step inside a span are not one distribution."""
    batch, rollout = sampled(model, tokenizer, n=1)
    with torch.no_grad():
        go = token_logprobs(model, batch, rollout, 0.9)
        at = (rollout.tokens == model.config.latent_id) & rollout.sampled
        r, t = (at & (go > math.log(0.1)) & (go < math.log(0.9))).nonzero()[0].tolist()
        cut = take(rollout, [r])
        cut.tokens, cut.sampled, cut.lengths = (
            cut.tokens[:, : t + 1].clone(),
            cut.sampled[:, : t + 1],
            torch.tensor([t + 1]),
        )
        cut.tokens[0, t] = model.config.latent_end_id  # the other choice at the same place
        cut.latents = [cut.latents[0][: int((cut.tokens == model.config.latent_id).sum())]]
        stop = token_logprobs(model, batch, cut, 0.9, prompt_of=torch.tensor([r]))
    assert (go[r, t].exp() + stop[0, t].exp()).item() == pytest.approx(1, abs=1e-5)


def test_entropy_of_words_and_of_a_stop(model, tokenizer):
    """Breaks if the logged entropy is not that of the choice there was."""
    batch, rollout = sampled(model, tokenizer, n=1)
    with torch.no_grad():
        out = replay(model, batch, rollout, 0.9)
        row = take(rollout, [2])  # a prompt of words alone
        n = int(row.lengths)
        ids = torch.cat(
            [batch["input_ids"][2][batch["attention_mask"][2].bool()], row.tokens[0, :n]]
        )[None]
        p = (model(ids, latents=row.latents[0]).logits[0, -n - 1 : -1].double() / 0.9).softmax(-1)
    for t, token in enumerate(row.tokens[0, :n].tolist()):
        if not row.sampled[0, t]:
            assert out.entropy[2, t] == 0
            continue
        q = (
            p[t]
            if token not in (model.config.latent_id, model.config.latent_end_id)
            else torch.stack(
                [p[t, model.config.latent_end_id], 1 - p[t, model.config.latent_end_id]]
            )
        )
        assert out.entropy[2, t].item() == pytest.approx(
            torch.distributions.Categorical(q).entropy().item(), abs=1e-4
        )


@pytest.mark.parametrize("head", [False, True])
def test_bf16_autocast(model, tokenizer, head, monkeypatch):
    """Breaks if a dtype does not fit where weights are fp32 and the arithmetic is bf16, as on
    CUDA by default.
    """
    batch = make_batch(tokenizer, ROWS, "left")
    shuffle(model, 5, head)
    monkeypatch.setattr(latent_decode, "LOGITS", 50)  # several pieces
    for more in (dict(), dict(share=True)):
        with torch.autocast("cpu", torch.bfloat16):
            rollout = generate(
                model,
                batch,
                max_new_tokens=20,
                max_latents=3,
                n=3,
                temperature=0.9,
                **more,
                eos_token_id=tokenizer.convert_tokens_to_ids(EOS.split()),
                generator=torch.Generator().manual_seed(0),
            )
            out = replay(model, batch, rollout, 0.9)
            loss = out.logprobs.sum() + adjoint_loss(
                out.logprobs.sum(), out.predicted, out.latents, 3
            )
        loss.backward()
        assert out.logprobs.dtype == torch.float32 and model.lm_head.weight.grad.isfinite().all()
        assert (out.logprobs - rollout.logprobs).abs().median() < 0.1  # rounding, not another state


# ------------------------------------------------------------------------- gradient through latents


def compute_norms_exactly(monkeypatch):
    """transformers' own computes in fp32 whatever comes in, too coarse for a difference."""

    def norm(self, x):
        variance = x.square().mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(Qwen3VLTextRMSNorm, "forward", norm)


def wide_rollout(model, tokenizer):
    """A float64 model with a head, and a rollout with several spans of several latents."""
    batch, rollout = sampled(
        model,
        tokenizer,
        head=True,
        rows=[ROWS[2], ROWS[4]],
        tokens=20,
        top_p=1.0,
        dtype=torch.float64,
    )
    found = [spans(t[:n].tolist(), model.config) for t, n in zip(rollout.tokens, rollout.lengths)]
    assert any(
        sum(k > 1 for k in row) > 1 for row in found
    )  # two spans of two latents or more in a row
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


def test_the_adjoint_gradient_equals_finite_differences(model, tokenizer, monkeypatch):
    """Breaks if any path from a weight through a latent to a later choice is lost.

    Constants must miss by a wide margin:
    the head gets no gradient at all, and the rest is wrong by more than a tenth of its size."""

    compute_norms_exactly(monkeypatch)
    batch, rollout = wide_rollout(model, tokenizer)
    A = torch.randn(
        len(rollout.tokens), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    layers = model.model.language_model.layers
    weights = [
        model.latent_head.weight,
        model.lm_head.weight,
        layers[0].self_attn.q_proj.weight,
        layers[1].mlp.down_proj.weight,
        model.model.language_model.norm.weight,
        model.get_input_embeddings().weight,
    ]
    longest = max(len(z) for z in rollout.latents)

    def gradient(terms):
        out = replay(model, batch, rollout, 0.9)
        loss = (A * out.logprobs).sum()
        total = loss + (adjoint_loss(loss, out.predicted, out.latents, terms) if terms else 0)
        return torch.autograd.grad(total, weights, allow_unused=True)

    exact, more, constants, one = gradient(longest), gradient(longest + 3), gradient(0), gradient(1)
    assert constants[0] is None  # the latent head: nothing at all
    model.train()  # recomputed layers give the same, through every term of the series
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for again, once in zip(gradient(longest), exact):
        torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-12)
    model.gradient_checkpointing_disable()
    generator, errors = torch.Generator().manual_seed(2), []
    for i, w in enumerate(weights):
        torch.testing.assert_close(exact[i], more[i], rtol=1e-9, atol=1e-9)  # the series has ended
        direction = torch.randn(w.shape, dtype=w.dtype, generator=generator)
        direction *= 1e-6 / direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                w.add_(sign * direction)
                values.append(decoded_again(model, batch, rollout, A))
                w.sub_(sign * direction)
        difference = (values[0] - values[1]) / 2
        by = [
            0.0 if g is None else (g * direction).sum().item()
            for g in (exact[i], constants[i], one[i])
        ]
        errors.append([abs(b - difference) / abs(difference) for b in by])
    errors = np.array(errors)
    print("relative errors (exact, constants, one term) by weight group:\n", errors)
    assert errors[:, 0].max() < 1e-6
    assert errors[0, 1] == 1 and np.median(errors[:, 1]) > 0.1
    assert np.median(errors[:, 2]) > 1e-3  # one term is not all of it


def test_ratio_one_gives_the_reinforce_gradient(model, tokenizer):
    """Breaks if clipping or the normalisation change the on-policy gradient of - sum A log p /
    tokens.
    """
    batch, rollout = sampled(model, tokenizer, head=True)
    A = torch.randn(len(rollout.tokens), 1, generator=torch.Generator().manual_seed(1))
    n = int(rollout.sampled.sum())
    config = la_dapo.Config(kl=0.0, temperature=0.9)
    prepared = Batch(batch, rollout, torch.arange(len(A)) // 6, A, torch.ones_like(A))
    loss, figures = la_dapo.policy_loss(model, prepared, Counts(n, 12, 2), config)
    ours = torch.autograd.grad(loss, model.lm_head.weight)[0]
    logp = token_logprobs(model, batch, rollout, 0.9)
    reinforce = torch.autograd.grad(-(A * logp).sum() / n, model.lm_head.weight)[0]
    torch.testing.assert_close(ours, reinforce, rtol=1e-4, atol=1e-6)
    assert (
        reinforce.abs().max() > 1e-3
        and figures["ratio"].item() == pytest.approx(1, abs=1e-4)
        and figures["clip_fraction"] == 0
        and math.sqrt(figures["replay_ms"]) < 1e-4  # the record is what a replay gives
    )


@pytest.mark.parametrize("moved, ratio", [(None, 1.0), (0.2, math.exp(0.2))])
def test_what_the_ratio_compares_with(model, tokenizer, moved, ratio):
    """Breaks if the decoder's record, which is off by 0.1 here, enters the ratio, or if its
    difference is not logged. moved: by how much the policy has moved since the first update.
    """
    batch, rollout = sampled(model, tokenizer, n=2)
    recorded = rollout.logprobs - 0.1 * rollout.sampled
    A = torch.ones(len(recorded), 1)
    prepared = Batch(
        batch,
        dataclasses.replace(rollout, logprobs=recorded),
        torch.arange(len(A)) // 2,
        A,
        torch.ones_like(A),
        old=None if moved is None else rollout.logprobs - moved,
    )
    config = la_dapo.Config(kl=0.0, temperature=0.9)
    counts = Counts(int(rollout.sampled.sum()), 12, 6)
    _, figures = la_dapo.policy_loss(model, prepared, counts, config)
    assert figures["ratio"].item() == pytest.approx(ratio, abs=1e-5)
    assert math.sqrt(figures["replay_ms"]) == pytest.approx(0.1, abs=1e-4)


# --------------------------------------------------------------------------------------------- loop


@pytest.fixture(scope="module")
def loud(world, tmp_path_factory):
    """The world's model with words that vary and many spans: rewards differ within a group, all
    answers are wrong.
    """
    model, tokenizer = load(world["model"], latent_head="linear")
    return save(shuffle(model, 4, True), tokenizer, tmp_path_factory.mktemp("loud") / "model")


def settings(world, loud, out, **more):
    data = {
        k: v
        for k, v in tiny.settings("sft").items()
        if k in ("image_max_tokens", "l_max", "max_length", "system")
    }
    return la_dapo.Config(
        **{
            **data,
            **dict(
                model=loud,
                data=world["data"],
                out=str(out),
                steps=4,
                seed=1,
                groups=4,
                group_size=3,
                rollout_batch=2,
                max_new_tokens=12,
                max_latents=2,
                filter=False,
                workers=0,
                lr=1e-3,
                micro_batch=2,
                save_every=2,
                temperature=1.0,
                adjoint_terms=-1,
            ),
            **more,
        }
    )


def flags(config, **more):
    """A config, some fields changed, as the command line has it."""
    argv = []
    for name, value in {**vars(config), **more}.items():
        if isinstance(value, bool):
            argv.append(f"--{'' if value else 'no-'}{name}")
        else:
            argv.append(f"--{name}={value}")
    return argv


def weights(checkpoint):
    return load_file(os.path.join(checkpoint, "model.safetensors"))


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def apart(a, b):
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


LAUNCH = """
import json, sys
sys.path.insert(0, {root!r})
import torch
import {module} as script
torch.set_num_threads(1)
script.train(script.Config(**json.loads(sys.argv[1])))
from common.machine import leave
leave()
"""


def launch(tmp_path, processes, config, wait=True):
    """The training of a config, la_dapo.py's or a variant's, in processes of its own."""
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH.format(root=ROOT, module=type(config).__module__))
    command = (
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
    run = subprocess.Popen(
        [*command, str(script), json.dumps(vars(config))],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    if wait:
        said, _ = run.communicate(timeout=240)
        return run.returncode, said
    return run


def straight_run(tmp_path, config):
    """In a process of its own, with one thread: another number of threads adds up in another
    order.
    """
    code, said = launch(tmp_path, 1, config)
    assert code == 0, said[-3000:]
    return checkpoints(config.out)[-1]


@pytest.mark.slow  # processes of their own
def test_two_processes_give_the_update_of_one(world, loud, tmp_path):
    """Breaks if the ranks sample other rollouts, count tokens apart, or take a mean where the sum
    is wanted. Seven groups a
    step in batches of one and three minibatches: most hold groups of both ranks, one of them more
    of one; with a reference model."""
    common = dict(
        steps=2, groups=7, rollout_batch=1, kl=0.05, minibatches=3, micro_batch=1, lr=1e-5
    )
    one = straight_run(tmp_path, settings(world, loud, tmp_path / "one", **common))
    code, said = launch(tmp_path, 2, settings(world, loud, tmp_path / "two", **common))
    assert code == 0, said[-3000:]
    a, b = weights(one), weights(tmp_path / "two" / "step_000002")
    assert apart(a, weights(loud)) > 3e-5 and apart(a, b) < 1e-6
    for x, y in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        for key in (
            "total",
            "accuracy",
            "ratio",
            "kl",
            "entropy",
            "grad_norm",
            "groups",
            "rollouts",
            "length",
        ):
            assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), key
    assert log_of(tmp_path / "one")[1]["kl"] > 0 and log_of(tmp_path / "one")[0]["updates"] == 3


def test_killed_and_resumed_equals_straight_through(world, loud, tmp_path):
    """Breaks if anything but the checkpoint (optimizer, place in the data, seeds) carries over
    from step to step.
    """
    straight = straight_run(tmp_path, settings(world, loud, tmp_path / "a"))
    run = launch(tmp_path, 1, settings(world, loud, tmp_path / "b", steps=4), wait=False)
    deadline = time.time() + 120
    while (
        not (tmp_path / "b" / "step_000002").exists()
        and time.time() < deadline
        and run.poll() is None
    ):
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert (tmp_path / "b" / "step_000002").exists()
    if (
        tmp_path / "b" / "step_000004"
    ).exists():  # it was faster than we are: take the last one away
        os.rename(tmp_path / "b" / "step_000004", tmp_path / "gone")
    resumed = straight_run(tmp_path, settings(world, loud, tmp_path / "b", resume=True))
    a, b = weights(straight), weights(resumed)
    assert apart(a, weights(loud)) > 1e-4 and all(torch.equal(a[k], b[k]) for k in a)
    lines = [
        [{k: v for k, v in line.items() if "seconds" not in k} for line in log_of(tmp_path / x)]
        for x in "ab"
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [0, 1, 2, 3]
    texts = [open(tmp_path / x / "rollouts_0.jsonl").read() for x in "ab"]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 2 * 4
    with pytest.raises(SystemExit, match="resume"):
        la_dapo.train(settings(world, loud, tmp_path / "b"))
    with pytest.raises(SystemExit, match="lambda_c"):
        la_dapo.train(settings(world, loud, tmp_path / "b", resume=True, lambda_c=0.3))


def run_folder(loud, folder):
    """A run's folder that holds the loud model as its second checkpoint."""
    shutil.copytree(loud, folder / "step_000002")
    return str(folder)


def test_the_reference_stays_where_the_run_began(world, loud, tmp_path):
    """Breaks if a run that goes on is compared with what --model leads to by then: the run's folder
    has got a newer checkpoint, with other weights.
    """
    start = run_folder(loud, tmp_path / "sft")
    config = settings(world, start, tmp_path / "a", steps=2, save_every=1, kl=0.05)
    straight = weights(la_dapo.train(config))
    shutil.rmtree(tmp_path / "a" / "step_000002")
    kl = [line["kl"] for line in log_of(tmp_path / "a")]
    shutil.copytree(world["model"], tmp_path / "sft" / "step_000003")
    resumed = weights(la_dapo.train(dataclasses.replace(config, resume=True)))
    assert kl[1] > 0 and [line["kl"] for line in log_of(tmp_path / "a")] == kl
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_another_reference_is_refused(world, loud, tmp_path):
    """Breaks if the reference's weights or config may change under a run, or it may go, unnoticed;
    or if a run without KL asks for one.
    """
    start = run_folder(loud, tmp_path / "sft")
    config = settings(world, start, tmp_path / "a", steps=2, save_every=1, kl=0.05)
    without = dataclasses.replace(config, out=str(tmp_path / "b"), kl=0.0)
    for c in (config, without):
        la_dapo.train(c)
        shutil.rmtree(os.path.join(c.out, "step_000002"))
    path = tmp_path / "sft" / "step_000002" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit, match="step_000001 needs .*step_000002, .*other weights now"):
        la_dapo.train(dataclasses.replace(config, resume=True))
    shutil.rmtree(tmp_path / "sft" / "step_000002")
    with pytest.raises(SystemExit, match="step_000002: no model there"):
        la_dapo.train(dataclasses.replace(config, resume=True))
    assert la_dapo.train(dataclasses.replace(without, resume=True)).endswith("step_000002")


def changed_rows(world, name, change, n=None):
    """A copy of the first n records, each after change(i, record) -> its path."""
    with open(world["data"]) as f:
        rows = [json.loads(line) for line in f][:n]
    for i, row in enumerate(rows):
        change(i, row)
    path = os.path.join(os.path.dirname(world["data"]), name)
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_open_answers_are_counted(world, loud, tmp_path, capsys):
    """Breaks if open answers without a judge are learnt from unsaid, or the judge is not named."""
    data = changed_rows(world, "open.jsonl", lambda i, row: i < 5 and row.pop("options"))
    more = dict(data=data, steps=1, groups=2)
    la_dapo.train(settings(world, loud, tmp_path / "a", **more))
    assert "5 open answers judged by exact match alone" in capsys.readouterr().out


def test_no_group_kept(world, loud, tmp_path):
    """Breaks if a step without a usable group (all answers wrong) stops the run, tries for ever,
    or moves a weight.
    """
    done = la_dapo.train(
        settings(world, loud, tmp_path / "a", filter=True, max_tries=3, steps=2, kl=0.1)
    )
    assert apart(weights(done), weights(loud)) == 0
    for i, line in enumerate(log_of(tmp_path / "a")):
        assert (line["groups"], line["kept"], line["too_hard"], line["updates"]) == (0, 0, 12, 0)
        assert "ratio" not in line and line["grad_norm"] is None
        assert (
            line["prompts"] == [12 * i, 12 * i + 12] and line["rollouts"] == 36
        )  # three tries of four prompts


def test_a_constant_reward_moves_nothing(world, loud, tmp_path):
    """Breaks if equal rewards give an advantage: only R_ctr and R_div vary here, and both are
    off.
    """
    done = la_dapo.train(
        settings(world, loud, tmp_path / "a", lambda_c=0.0, lambda_d=0.0, kl=0.0, steps=2)
    )
    assert apart(weights(done), weights(loud)) == 0
    assert all(
        line["total_std"] == 0 and line["groups"] == 4 and line["grad_norm"] == 0
        for line in log_of(tmp_path / "a")
    )


def test_a_gradient_that_is_not_finite(world, loud, tmp_path, monkeypatch):
    """Breaks if one bad step spoils the weights, or passes without a word in the log."""
    exact, calls = la_dapo.adjoint_loss, []

    def spoiled(*args):
        calls.append(1)
        return exact(*args) * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setattr(la_dapo, "adjoint_loss", spoiled)
    done = la_dapo.train(settings(world, loud, tmp_path / "a", steps=2))
    assert [line["updates_skipped"] for line in log_of(tmp_path / "a")] == [1, 0]
    assert (
        all(v.isfinite().all() for v in weights(done).values())
        and apart(weights(done), weights(loud)) > 1e-4
    )


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
    """Breaks if a judge's silence counts as wrong, reaches the loss, or stops the run when it is
    all there is.
    """
    monkeypatch.setattr(rewards, "needs_judge", lambda *a: True)
    monkeypatch.setattr(rewards, "answer_of", lambda text: text)
    monkeypatch.setattr(la_dapo, "judge_of", lambda config: FakeJudge(lambda answer: None))
    done = la_dapo.train(
        settings(world, loud, tmp_path / "a", judge_model="m", steps=2, max_tries=2)
    )
    assert apart(weights(done), weights(loud)) == 0
    for line in log_of(tmp_path / "a"):
        assert (line["unjudged"], line["unjudged_groups"], line["groups"]) == (24, 8, 0)
        assert line["judge_failures"] == {"down": 4}  # of this step: four batches
    # every third is silent, the others differ: two of three rollouts are left, with rewards 0 and 1
    verdicts = iter([None, True, False] * 100)
    monkeypatch.setattr(
        la_dapo, "judge_of", lambda config: FakeJudge(lambda answer: next(verdicts))
    )
    seen, inner = [], la_dapo.batch_of
    monkeypatch.setattr(la_dapo, "batch_of", lambda *a: seen.append(inner(*a)) or seen[-1])
    la_dapo.train(
        settings(
            world,
            loud,
            tmp_path / "b",
            judge_model="m",
            steps=1,
            filter=True,
            lambda_c=0.0,
            lambda_d=0.0,
        )
    )
    (line,) = log_of(tmp_path / "b")
    assert (line["unjudged"], line["kept"], line["accuracy"]) == (4, 4, 0.5)
    rows = torch.cat([p.A for p in seen])[:, 0]  # the advantages that reach the loss
    assert (
        len(rows) == 8
        and torch.allclose(rows.abs(), torch.tensor(0.5 / math.sqrt(0.5)), atol=1e-4)
        and rows.sum() < 1e-6
    )


def test_equal_rollouts_are_replayed_once_and_counted(world, loud, tmp_path, monkeypatch):
    """Breaks if merging equal rollouts changes the update: the same without merging, and with one
    row for all.
    """
    common = dict(steps=1, temperature=0.05, group_size=6, lr=1e-2)  # so sure that samples coincide
    rows, inner = [], la_dapo.batch_of

    def counted(batch):
        rows.append(len(batch.rollout.tokens))
        return batch

    monkeypatch.setattr(la_dapo, "batch_of", lambda *a: counted(inner(*a)))
    merged = weights(la_dapo.train(settings(world, loud, tmp_path / "a", **common)))
    fewer, rows[:] = sum(rows), []
    alone = [[i] for i in range(6)]
    monkeypatch.setattr(
        la_dapo, "batch_of", lambda *a: counted(inner(*a[:2], distinct=lambda group: alone))
    )
    plain = weights(la_dapo.train(settings(world, loud, tmp_path / "b", **common)))
    assert fewer < sum(rows) == 24
    a, b = log_of(tmp_path / "a")[0], log_of(tmp_path / "b")[0]
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3) and a[
        "entropy"
    ] == pytest.approx(b["entropy"], rel=1e-3)
    start = weights(
        loud
    )  # Adam's first step is a sign: compare sums over all weights, not the one at rounding level
    moved, off = (
        sum((x[k] - y[k]).abs().sum().item() for k in x)
        for x, y in ((plain, start), (plain, merged))
    )
    assert moved > 1 and off < 1e-3 * moved


def test_minibatches_make_the_clip_act(world, loud, tmp_path, monkeypatch):
    """Breaks if later updates of a step still see a ratio of 1, or if they compare with what the
    decoder recorded: its kernels round otherwise, here by as much as 0.1.
    """
    how = dict(steps=1, minibatches=2, inner_epochs=3, lr=2e-2, adjoint_terms=0)
    first = la_dapo.train(settings(world, loud, tmp_path / "a", **how))
    (line,) = log_of(tmp_path / "a")
    assert line["updates"] == 6 and line["clip_fraction"] > 0.01

    def rounded(*args):
        groups = roll_out(*args)
        for group in groups:
            group.rollout.logprobs += 0.1
        return groups

    roll_out = la_dapo.roll_out
    monkeypatch.setattr(la_dapo, "roll_out", rounded)
    second = la_dapo.train(settings(world, loud, tmp_path / "b", **how))
    assert all(map(torch.equal, weights(first).values(), weights(second).values()))
    assert log_of(tmp_path / "b")[0]["replay_rms"] != line["replay_rms"]


def ten_rows(world, name, broken, **more):
    """A copy of the first ten rows, with more fields; those named have clips that are not there."""

    def change(i, row):
        row.update(more)
        if i in broken:
            row["video"] = "clips/missing.mp4"

    return changed_rows(world, name, change, 10)


def test_surplus_and_broken_clips(world, loud, tmp_path):
    """Breaks if a clip that cannot be read is lost without its name, surplus groups are trained on,
    or the order of the data is not each prompt once an epoch.
    """
    data = ten_rows(world, "ten.jsonl", broken=[3])
    more = dict(data=data, steps=3, groups=3, rollout_batch=2, prompts=4, save_every=1)
    la_dapo.train(settings(world, loud, tmp_path / "a", **more))
    lines = log_of(tmp_path / "a")
    assert [line["prompts"] for line in lines] == [[0, 4], [4, 8], [8, 12]]
    skipped = [name for line in lines for name, _ in line["skipped_names"]]
    assert set(skipped) == {f"{data}:3"} and sum(line["rollouts"] for line in lines) == 3 * (
        12 - len(skipped)
    )
    assert sum(line["groups"] + line["surplus"] for line in lines) == 12 - len(skipped)
    assert all(line["groups"] <= 3 for line in lines)
    ids = [json.loads(line)["id"] for line in open(tmp_path / "a" / "rollouts_0.jsonl")]
    assert len(set(ids)) == 9  # all ten prompts came by, one of them is broken


def test_an_epoch_counts_updates_and_refills_wrap(world, loud, tmp_path):
    """Breaks if refills eat up the epoch: one epoch is N // groups updates, as official counts.

    Ten prompts, no group is ever kept (all answers are wrong), so each step costs max_tries passes.
    """
    data = ten_rows(world, "epoch.jsonl", broken=[])
    more = dict(data=data, steps=0, groups=3, prompts=4, max_tries=3, filter=True, final_lr=0.1)
    done = la_dapo.train(settings(world, loud, tmp_path / "a", **more))
    lines = log_of(tmp_path / "a")
    assert len(lines) == 10 // 3 and done.endswith("step_000003")
    assert [line["prompts"] for line in lines] == [[0, 12], [12, 24], [24, 36]]
    rates = [line["lr"] for line in lines]  # final_lr needs no --steps
    assert rates == pytest.approx([1e-3, 5.5e-4, 1e-4])
    few = settings(world, loud, tmp_path / "b", **dict(more, groups=40, prompts=2, max_tries=1))
    la_dapo.train(few)
    assert len(log_of(tmp_path / "b")) == 1  # at least one


def test_an_answer_that_is_no_option_is_named_and_left_out(world, loud, tmp_path, capsys):
    """Breaks if one bad record ends a run, is learnt from, or is lost unnamed; or if a file
    full of them trains all the same."""
    data = changed_rows(world, "odd.jsonl", lambda i, r: i == 5 and r.update(answer="purple"))
    more = dict(data=data, steps=1, groups=24, rollout_batch=8, max_tries=1)
    la_dapo.train(settings(world, loud, tmp_path / "a", **more))
    assert log_of(tmp_path / "a")[0]["rollouts"] == 24 * 3  # wraps: 23 rows and the first again
    assert f"{data}:5" in capsys.readouterr().out
    with open(data) as f:
        records = [json.loads(line) for line in f]
    ids = [json.loads(line)["id"] for line in open(tmp_path / "a" / "rollouts_0.jsonl")]
    assert records[5]["id"] not in ids and len(set(ids)) == 23
    more["data"] = changed_rows(
        world, "odd.jsonl", lambda i, r: i < 5 and r.update(answer="purple")
    )
    with pytest.raises(SystemExit):
        la_dapo.train(settings(world, loud, tmp_path / "b", **more))


def test_nothing_readable_ends_the_run(world, loud, tmp_path):
    """Breaks if a wrong media_root trains for hours on nothing."""
    data = ten_rows(world, "none.jsonl", broken=range(10))
    with pytest.raises(SystemExit, match="no such file"):
        la_dapo.train(settings(world, loud, tmp_path / "b", data=data, steps=0, groups=4))
    with pytest.raises(SystemExit, match="nothing to train on"):
        la_dapo.train(settings(world, loud, tmp_path / "c", data=data, steps=0, epochs=0.0))


def test_bad_settings_are_refused(world, loud, tmp_path):
    """Breaks if a combination without meaning runs."""
    for bad in (
        dict(temperature=0.0),
        dict(adjoint_terms=-2),
        dict(judge_url="http://x"),
        dict(prompts=-1),
        dict(steps=-1),
        dict(tau=0.0),
        dict(groups=0),
        dict(group_size=1),
    ):
        with pytest.raises(ValueError):
            settings(world, loud, tmp_path / "x", **bad)


@pytest.mark.parametrize("more", [dict(share=True), dict(adjoint_terms=1), dict(kl=0.0)])
def test_each_ablation_runs(world, loud, tmp_path, more):
    """Breaks if a flag of the comparison table does not reach the end of a step, or writes a log
    that is no number.
    """
    la_dapo.train(settings(world, loud, tmp_path / "a", steps=1, **more))
    (line,) = log_of(tmp_path / "a")
    assert (
        all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        and line["grad_norm"] > 0
    )
    assert line["ratio"] == pytest.approx(1, abs=1e-3)
    assert os.path.getsize(tmp_path / "a" / "rewards.png") > 5000
