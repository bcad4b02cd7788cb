"""curate.py against its plain twin: the same counts of right answers, the same rows, in order."""

import dataclasses
import functools

import pytest
import twin
from twin_world import (
    in_double,
    read_lines,
    recorded_numbers,
    records_with_futures,
    save_model,
    speak,
)

import curate

SETTINGS = dict(
    workers=0, system="watch", image_max_tokens=2, l_max=4, rollouts=5, batch=3, seed=5,
    temperature=0.85, top_p=0.92, max_new_tokens=19, max_latents=3, k=3, max_p_t=4, min_gain=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin_curate")
    change = functools.partial(speak, context=0.6)
    return dict(
        data=records_with_futures(folder, 10), model=save_model(folder / "m", 0, 48, change)
    )


def test_same_rows(world, tmp_path):
    """Breaks if the two conditions are exchanged, the later frames are not shown, rollouts are not
    sampled as asked, or the cut and its ties are others.
    """
    config = curate.Config(**world, **SETTINGS, out=str(tmp_path))
    with in_double():
        with recorded_numbers() as numbers:
            curate.main(config)
        expected = twin.probe(config, numbers)
    lines = read_lines(tmp_path / "probe.jsonl")
    assert [{k: line[k] for k in expected[0]} for line in lines] == expected

    # as asked; all that is kept; only what was never right; the paper's thresholds as shares of n
    chosen = []
    for cut in (dict(), dict(k=0), dict(max_p_t=0, k=9), dict(max_p_t=-1, min_gain=-1)):
        again = dataclasses.replace(config, part="select", **cut)
        with in_double():
            curate.main(again)
        chosen.append([record["id"] for record in read_lines(tmp_path / "selected.jsonl")])
        assert chosen[-1] == twin.select(expected, again), cut
    print(expected, chosen)

    # what is claimed to act has acted
    assert len(chosen[0]) < len(chosen[1]) < len(expected), "K and the thresholds"
    assert len(chosen[3]) < len(chosen[2]) < len(chosen[1]), "each of the two thresholds"
    ranks = {line["id"]: (line["p_v"] - line["p_t"], line["p_t"]) for line in expected}
    kept = [ranks[id] for id in chosen[1]]
    assert len(set(kept)) < len(kept), "a tie that only the hash decides"
    assert len({gain for gain, _ in kept}) < len(set(kept)), "a tie that p_t decides"
    assert any(line["no_answer"] for line in expected)
