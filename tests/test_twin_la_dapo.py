"""la_dapo.py against its plain twin: from the same settings, data and random numbers to the same
rewards, groups, figures and weights.
"""

import dataclasses
import os
from collections import Counter

import pytest
import torch
import twin
from safetensors.torch import load_file
from twin_world import (
    Judge,
    disagreement,
    in_double,
    picture,
    read_lines,
    recorded_numbers,
    save_model,
    speak,
    write_records,
)

import la_dapo

# every number differs from 0, from 1 and from the others, so that none can be lost or exchanged
SETTINGS = dict(
    seed=10, workers=0, save_every=100, system="watch", image_max_tokens=2,
    groups=5, group_size=4, prompts=5, max_tries=9, rollout_batch=3, temperature=0.85, top_p=0.92,
    max_new_tokens=19, max_latents=3, lambda_c=0.35, lambda_d=0.15, tau=0.45, low=0.24, high=0.7,
    eps_low=0.12, eps_high=0.21, dual_clip=1.6, kl=0.3, steps=2, minibatches=2, inner_epochs=2,
    micro_batch=2, lr=4e-3, final_lr=0.6, beta2=0.97, clip=0.8,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Seven prompts with no to two pictures, four of them with options, and a model that varies."""
    folder = tmp_path_factory.mktemp("twin_la_dapo")
    sizes = [(32, 32), (32, 64)]  # 1 and 2 tokens
    shown = [picture(folder, f"seen{i}.png", *sizes[i % 2], i) for i in range(4)]
    answers = ["red", "blue", "up", "red", "green", "blue", "red"]
    records = []
    for i, answer in enumerate(answers):
        record = dict(id=f"row {i}", problem=f"which {'wall ' * (i % 3)}next ?", answer=answer)
        record["images"] = [shown[(i + k) % 4] for k in range(i % 3)]
        if i % 2 == 0:
            record["options"] = ["red", "green", "blue", "up"]
        records.append(record)
    data = write_records(folder / "rows.json", records)
    return dict(model=save_model(folder / "model", 0, 48, speak), data=data)


def train_both(world, out, **more):
    """Both trainings -> log lines, the twin's, what else it knows of each step, `disagreement`."""
    config = la_dapo.Config(**{**world, **SETTINGS, **more, "out": str(out)})
    judge, judge_of_twin = Judge(), Judge()
    with recorded_numbers() as numbers, pytest.MonkeyPatch.context() as patch:
        patch.setattr(la_dapo, "judge_of", lambda config: judge)
        checkpoint = la_dapo.train(config)
    weights, figures, steps = twin.la_dapo(config, numbers, judge_of_twin)
    ratio = disagreement(world["model"], checkpoint, weights)
    print(f"la_dapo.py and its twin, {more}: {ratio:.1e}")
    log = read_lines(out / "log.jsonl")
    assert len(log) == len(figures)
    for line, expected in zip(log, figures):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name
    assert judge.asked == judge_of_twin.asked
    return log, steps, ratio


def equal_rollouts(steps, same_verdict):
    """How many pairs of learnt rollouts have the same tokens, and the same verdict or not."""
    count = 0
    for step in steps:
        for group in step["kept"]:
            for i in group.judged:
                for j in group.judged:
                    same = group.rollouts[i].tokens == group.rollouts[j].tokens
                    same_right = group.correct[i] == group.correct[j]
                    count += i < j and same and same_right == same_verdict
    return count


def test_same_weights(world, tmp_path):
    """Breaks if anything is lost or exchanged between the settings and the weights of two steps of
    two passes over two minibatches: what is sampled, in which order, how it is rewarded, which
    groups are kept, how often each token counts and with which advantage, the clip's bounds, KL.
    """
    with in_double():
        log, steps, ratio = train_both(world, tmp_path)
    assert ratio < 1e-9

    # what is claimed to act has acted
    total = {k: sum(line[k] for line in log) for k in log[0] if isinstance(log[0][k], (int, float))}
    for name in (
        "too_easy",
        "too_hard",
        "surplus",
        "unjudged",
        "forced_stops",
        "cut_off",
        "format",
    ):
        assert total[name], name
    assert total["contrastive"] and total["diversity"] and total["kl"]
    assert any(line["prompts"][1] - line["prompts"][0] > 6 for line in log), "a refill"
    assert log[-1]["prompts"][1] > 2 * 7, "another order in each epoch"
    for name in ("high", "low", "dual"):
        assert any(step[name] for step in steps), f"bound {name} never acted"
    norms = [norm for step in steps for norm in step["norms"]]
    assert min(norms) < SETTINGS["clip"] < max(norms)
    accuracies = [a for step in steps for group in step["kept"] for a in group.parts["accuracy"]]
    assert {None, -1.0, 0.0, 1.0} == set(accuracies)  # unjudged, repetitive, wrong, right
    assert equal_rollouts(steps, True), "rollouts that are replayed once"
    assert equal_rollouts(steps, False), "rollouts that a judge told apart"


EXACT = dict(adjoint_terms=-1, minibatches=1, inner_epochs=1, groups=3, prompts=3, warmup_steps=3)
EXACT |= dict(gradient_checkpointing=True)


def test_same_weights_through_latents(world, tmp_path):
    """Breaks if the gradient through the latents is not the whole of it, or if the KL's is let
    through too. The twin lets the weights make the latents anew and differentiates that.
    """
    with in_double():
        _, steps, ratio = train_both(world, tmp_path, **EXACT, filter=False, merge_equal=True)
    assert ratio < 1e-9
    assert any(len(r.latents) > 2 for step in steps for g in step["kept"] for r in g.rollouts)


# one group of three rollouts with long spans
FEW = dict(groups=1, prompts=1, rollout_batch=1, group_size=3, steps=1, max_latents=5, seed=9)
FEW |= dict(filter=False)


def test_two_terms_of_the_series(world, tmp_path):
    """Breaks if the second term is not g J, with J written out as a matrix, on a response of four
    latents and more, where g + g J is not the whole of it.
    """
    with in_double():
        _, steps, ratio = train_both(world, tmp_path, **{**EXACT, **FEW, "adjoint_terms": 2})
    assert ratio < 1e-9
    assert max(len(r.latents) for r in steps[0]["kept"][0].rollouts) >= 4


def plain_step(trained, lr, *_, **__):
    """An optimizer that moves the weights by lr times the gradient, in the place of AdamW."""
    return torch.optim.SGD(trained, lr)


@pytest.mark.parametrize("terms", [0, -1])
def test_gradient_by_finite_differences(world, tmp_path, terms, monkeypatch):
    """Breaks if the gradient of a step is not that of the loss with the latents held at the
    recorded ones (0), or made anew by the weights (-1). The step is the gradient itself.
    """
    monkeypatch.setattr(torch.optim, "AdamW", plain_step)
    more = dict(FEW, adjoint_terms=terms, lr=0.5, warmup_steps=0, clip=1e6)
    with in_double():
        with recorded_numbers() as numbers:
            config = la_dapo.Config(**{**world, **SETTINGS, **EXACT, **more, "out": str(tmp_path)})
            after = load_file(os.path.join(la_dapo.train(config), "model.safetensors"))
        _, _, steps = twin.la_dapo(config, numbers)
        model, reference = twin.load(world["model"])[0], twin.load(world["model"])[0]
        compared = dataclasses.replace(config, inner_epochs=2)  # with what was recorded, a constant

        @torch.no_grad()
        def loss():
            return twin.loss_of(model, reference, steps[0]["kept"], compared, Counter())

        generator, weights = torch.Generator().manual_seed(1), dict(model.named_parameters())
        for name in (
            "lm_head.weight",
            "latent_head.weight",
            "latent_head.bias",
            "model.language_model.norm.weight",
            "model.language_model.embed_tokens.weight",
            "model.language_model.layers.0.self_attn.q_proj.weight",
            "model.language_model.layers.1.mlp.down_proj.weight",
        ):
            w, values = weights[name], []
            gradient = (w.detach() - after[name]) / config.lr
            direction = torch.randn(w.shape, generator=generator)
            direction *= 1e-5 / direction.norm()
            for sign in (1, -1):
                with torch.no_grad():
                    w += sign * direction
                    values.append(loss().item())
                    w -= sign * direction
            by_gradient = (gradient * direction).sum().item()
            difference = (values[0] - values[1]) / 2
            print(terms, name, by_gradient, difference)
            assert by_gradient == pytest.approx(difference, rel=1e-6, abs=1e-14), name
            assert (by_gradient == 0) == (terms == 0 and "head" in name and "lm" not in name)
