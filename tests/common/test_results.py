"""Result lines: what is done and what gives way to what. Intervals, by known deviations."""

import dataclasses
import json

import numpy as np
import pytest

from common.formats import RecordError, Row, Skipped
from common.machine import Machine
from common.results import (
    Book,
    bootstrap,
    mean_of,
    paired_bootstrap,
    prompt_hash,
    share_interval,
    walk,
    wilson,
)

ROWS = {
    id: Row(f"f:{i}", id, ["what ?"], [], "x", "what ?", ["x", "y"]) for i, id in enumerate("abcde")
}


def book(folder, rows=ROWS, settings=None):
    return Book(str(folder), "lines", rows, settings or dict(seed=0), Machine())


def write_part(folder, rank, *lines):
    with open(folder / f"lines_{rank}.jsonl", "a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_result_is_final_and_what_is_open_gives_way(tmp_path):
    """Breaks if a skip replaces a result, a result does not replace a skip, or either is lost."""
    first = book(tmp_path)
    assert first.blocks(2) == [["a", "b"], ["c", "d"], ["e"]]
    first.add(dict(a=dict(p=1), b=dict(skipped="no clip"), c=dict(unjudged=1)))
    again = book(tmp_path)
    assert again.missing("abcde") == ["b", "d", "e"]
    assert again.blocks(2) == [["a", "b"], ["c", "d"], ["e"]]
    again.add(dict(a=dict(p=9), b=dict(p=2), c=dict(p=3), d=dict(skipped="no clip")))
    lines = again.finish()
    assert {id: line.get("p") for id, line in lines.items()} == dict(a=1, b=2, c=3, d=None)
    assert list(lines) == list("abcd")
    on_disk = [json.loads(line) for line in open(tmp_path / "lines.jsonl")]
    assert on_disk == list(lines.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lines.jsonl", "settings.json"]
    assert book(tmp_path).blocks(2) == [["c", "d"], ["e"]]


def test_the_order_of_the_parts_does_not_matter(tmp_path):
    """Breaks if a later part's skip hides a result or an unjudged line, or the other way round."""
    book(tmp_path)
    about = dict(group="all", prompt=prompt_hash(ROWS["a"]))
    gone, waits = dict(skipped="gone"), dict(**about, unjudged=1)
    write_part(tmp_path, 0, dict(id="a", **gone), dict(id="b", **about, p=1), dict(id="c", **waits))
    write_part(tmp_path, 1, dict(id="a", **about, p=2), dict(id="b", **gone), dict(id="c", **gone))
    lines = book(tmp_path).finish()
    assert lines["a"]["p"] == 2 and lines["b"]["p"] == 1 and lines["c"]["unjudged"] == 1


def test_other_settings_and_other_rows_are_refused(tmp_path):
    """Breaks if two kinds of results share a folder: other settings, a changed question."""
    book(tmp_path).add(dict(a=dict(p=1)))
    with pytest.raises(SystemExit, match="other values of seed, top_p: choose another --out"):
        book(tmp_path, settings=dict(seed=1, top_p=1))
    for change in (dict(answer="y"), dict(prompt=["why ?"]), dict(options=["x", "z"])):
        changed = dict(ROWS, a=dataclasses.replace(ROWS["a"], **change))
        with pytest.raises(SystemExit, match="f:0: .* holds 'a' with another question"):
            book(tmp_path, rows=changed)
    unusable = dict(ROWS, a=Skipped("f:0", "broken"))
    assert book(tmp_path, rows=unusable).missing("a") == []  # its result stands


def test_a_run_on_fewer_rows_loses_nothing(tmp_path):
    """Breaks if a run on the first rows alone drops the results of the others from the file."""
    whole = book(tmp_path)
    whole.add({id: dict(p=i) for i, id in enumerate(ROWS)})
    whole.finish()
    few = book(tmp_path, rows={id: ROWS[id] for id in "ba"})
    assert few.blocks(2) == [] and list(few.finish()) == ["b", "a"]
    again = book(tmp_path)
    assert again.blocks(2) == []
    assert [line["p"] for line in again.finish().values()] == [0, 1, 2, 3, 4]


def test_a_walk_gives_what_can_be_read(tmp_path):
    """Breaks if a row that cannot be read ends the walk, has no line, or shifts its neighbours; or
    if a block comes again of which only such rows have no result.
    """

    def encode(row):
        if row.id == "b":
            raise RecordError("f:1: too long")
        return np.array([ord(row.id)])

    rows = dict(ROWS, e=Skipped("f:4", "no future"))
    for expected in ([("a",), ("c", "d")], [("a",)]):  # "a" gets no line, so its block comes again
        some = book(tmp_path, rows)
        found = []
        for block, encoded in walk(some, some.blocks(2), encode, 0):
            found.append(tuple(row.id for row in block))
            assert [chr(x.item()) for x in encoded] == [row.id for row in block]
            assert all(type(x) is np.ndarray for x in encoded)
            some.add({row.id: dict(p=1) for row in block if row.id != "a"})
        assert found == expected
        lines = some.finish()
        assert [lines[id]["skipped"] for id in "be"] == ["f:1: too long", "no future"]


# ---------------------------------------------------------------------------------------- intervals


def test_wilson_by_known_values():
    """Breaks if the interval is not Wilson's: 8 of 10 gives 0.490 - 0.943, 0 of 20 gives 0 - 0.161
    (published).
    """
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4) and wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_of_known_deviations():
    """Breaks if the draws are not seeded, or the interval is not that of the mean of the groups'
    means.
    """
    values, few = [0, 1] * 50, np.arange(50) ** 2
    assert bootstrap(few) == bootstrap(few) != bootstrap(few, seed=1)
    half = 1.96 * 0.05  # sqrt(.25 / 100) = .05
    assert bootstrap(values) == pytest.approx([0.5 - half, 0.5 + half], abs=0.02)
    groups = ["x"] * 100 + ["y"] * 70  # y is always right: half of the spread, around .75
    interval = bootstrap(values + [1] * 70, groups=groups)
    assert interval == pytest.approx([0.75 - half / 2, 0.75 + half / 2], abs=0.012)
    assert mean_of(values + [1] * 70, groups) == 0.75 and mean_of([]) == 0
    assert bootstrap([2.5]) == [2.5, 2.5]
    for wrong in (dict(values=[]), dict(values=[1], clips=[]), dict(values=[1], groups=[])):
        with pytest.raises(ValueError, match="values, . clips, . groups"):
            bootstrap(**wrong)


def test_groups_that_share_their_clips_are_drawn_together():
    """Breaks if each group draws clips of its own: four groups with the same answers on the same
    100 clips are one group, so their interval is not narrower than one group's by half.
    """
    values, clips = [0, 1] * 50, [f"{i:02}" for i in range(100)]
    together = bootstrap(values * 4, clips * 4, groups=np.repeat(list("wxyz"), 100))
    assert together == bootstrap(values, clips)
    apart = bootstrap(values * 4, np.arange(400), groups=np.repeat(list("wxyz"), 100))
    assert np.diff(apart) < 0.6 * np.diff(together)


def test_one_interval_for_each_score():
    """Breaks if a point is called an interval (all answers equal), a few clips are bootstrapped,
    or questions on the same clip count as clips for Wilson's.
    """
    clips = [f"{i:02}" for i in range(40)]
    mixed = [0, 1] * 20
    assert share_interval(mixed, clips) == bootstrap(mixed, clips)
    for groups in (None, ["x", "y"] * 20):
        assert share_interval([1] * 40, clips, groups) == pytest.approx(wilson(40, 40), abs=1e-6)
    assert share_interval(mixed[:20], clips[:20]) == pytest.approx(wilson(10, 20), abs=1e-6)
    four_each = share_interval(mixed[:20] * 4, clips[:20] * 4)
    assert four_each == pytest.approx(wilson(10, 20), abs=1e-6)
    assert share_interval(mixed[:20], clips[:20], ["x", "y"] * 10) == [0.5, 0.5]  # x wrong, y right
    assert share_interval([], []) == [0, 1]


def test_a_paired_interval_is_that_of_the_differences():
    """Breaks if the two runs are drawn apart, or b - a is a - b.

    400 questions, 80 won and 20 lost: mean .15, variance .25 - .15^2. Drawn apart, the runs' own
    variances would add up to about .5.
    """
    a = np.array([0] * 80 + [1] * 20 + [0, 1] * 150)
    b = np.array([1] * 80 + [0] * 20 + [0, 1] * 150)
    gain, (low, high) = paired_bootstrap(a, b)
    half = 1.96 * np.sqrt((0.25 - 0.15**2) / 400)
    assert gain == 0.15 and (low, high) == pytest.approx((0.15 - half, 0.15 + half), abs=0.006)
    assert paired_bootstrap(a, b) == (gain, [low, high]) != paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap(a, a + 0.25) == (0.25, [0.25, 0.25])  # a shift that is everywhere


def test_a_paired_interval_draws_clips_and_weighs_groups_alike():
    """Breaks if three questions alike on each clip count as three draws, or a macro difference is
    not the mean of the groups' differences: (1 + 0) / 2.
    """
    a, b = np.random.default_rng(1).integers(2, size=(2, 100))
    alone = paired_bootstrap(a, b, [f"{i:02}" for i in range(100)])
    clips = np.repeat([f"{i:02}" for i in range(100)], 3)
    assert paired_bootstrap(np.repeat(a, 3), np.repeat(b, 3), clips) == alone
    a, b, groups = [0, 0, 0, 1, 0] * 20, [1, 1, 1, 1, 0] * 20, ["x", "x", "x", "y", "y"] * 20
    assert paired_bootstrap(a, b, groups=groups) == (0.5, [0.5, 0.5])
    assert paired_bootstrap(a, b)[0] == pytest.approx(0.6)
