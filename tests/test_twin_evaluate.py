"""evaluate.py against its plain twin: the same responses, whatever the spans are fed."""

import functools

import pytest
import twin
from twin_world import CHAIN, in_double, read_lines, records_with_futures, save_model, speak

import evaluate
import latent_decode

SETTINGS = dict(
    workers=0, system="watch", image_max_tokens=2, l_max=4, batch=3, seed=2, max_new_tokens=17,
    max_latents=3, report=0,
)  # fmt: skip

# what comes next is nearly a tie, so that what is fed decides
NEAR_TIES = CHAIN | {
    "assistant": {"<reason>": 0.35, "<|latent_start|>": 0.6},
    "<reason>": {"moves": 0.45, "hits": 0.45},
    "moves": {"left": 0.3, "right": 0.3, "up": 0.3},
    "left": {"</reason>": 0.9},
    "hits": {"red": 0.25, "blue": 0.25, "green": 0.25},
    "</reason>": {"<|latent_start|>": 0.5, "<answer>": 0.45},
    "<|latent_start|>": {"<|latent_end|>": 0.3, "red": 0.3},
    "<|latent_end|>": {"<reason>": 0.32, "<answer>": 0.32, "<|latent_start|>": 0.3},
    "<answer>": {"red": 0.25, "blue": 0.25, "green": 0.25},
}
NEAR_TIES |= {
    colour: {"</answer>": 0.33, "</reason>": 0.33, "<|latent_start|>": 0.33}
    for colour in ("red", "green", "blue")
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin_evaluate")
    change = functools.partial(speak, chain=NEAR_TIES, context=1.5)
    return dict(data=records_with_futures(folder), model=save_model(folder / "m", 0, 48, change))


def both(world, out, latents):
    """Both evaluations -> the lines of samples.jsonl, the accuracy, the twin's lines."""
    config = evaluate.Config(**world, **SETTINGS, out=str(out), latents=latents)
    with in_double(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_decode, "CHUNK", 4)  # a row that is done leaves soon
        table = evaluate.evaluate(config)
        expected = twin.evaluate(config)
    lines = {line["id"]: line for line in read_lines(out / "samples.jsonl")}
    return lines, table["all"]["accuracy"], expected


KINDS = ("generated", "zero", "noise", "shuffled", "true", "pause", "none")


def test_same_responses(world, tmp_path):
    """Breaks if a span is fed anything else than asked for, for one row or for all: another row's
    futures, one about the same clip, the wrong frame of several, noise of another scale.
    """
    responses, right = {}, 0
    for kind in KINDS:
        lines, accuracy, expected = both(world, tmp_path / kind, kind)
        for line in expected:
            assert {k: lines[line["id"]][k] for k in line} == line, kind
        assert accuracy == pytest.approx(sum(line["right"] for line in expected) / len(expected))
        right += sum(line["right"] for line in expected)
        responses[kind] = [(line["response"], line["latents"]) for line in expected]
        print(kind, accuracy, responses[kind])

    # what is claimed to act has acted
    assert len(set(map(tuple, responses.values()))) == len(KINDS), "each kind answers differently"
    assert right, "some answers are right"
    assert max(line["spans"] for line in lines.values()) == 0, "none: no span is opened"
    assert {n for _, n in responses["true"]} > {0, 3, 6}, "no span, one, and several"


def test_donors_are_about_another_clip(world, tmp_path, monkeypatch):
    """Breaks if `shuffled` would look the same with the futures of a row about the same clip."""
    lines, _, expected = both(world, tmp_path, "shuffled")
    monkeypatch.setattr(twin, "donor_of", lambda row, rows: rows[rows.index(row) ^ 1])
    with in_double():
        same_clip = twin.evaluate(evaluate.Config(**world, **SETTINGS, latents="shuffled"))
    differ = [lines[line["id"]]["response"] != line["response"] for line in same_clip]
    assert sum(differ) >= 2
