"""What is done, by whom, and what gives way to what."""

import dataclasses
import json

import pytest

from common.formats import Row, Skipped
from common.runs import Machine
from common.walk import Book, prompt_hash

ROWS = {
    id: Row(f"f:{i}", id, ["what ?"], [], "x", "what ?", ["x", "y"]) for i, id in enumerate("abcde")
}


def book(folder, rows=ROWS, settings=None):
    return Book(str(folder), "lines", rows, settings or dict(seed=0), Machine())


def write_part(folder, rank, *lines):
    texts = [json.dumps(line) for line in lines]
    with open(folder / f"lines_{rank}.jsonl", "a") as f:
        f.write("".join(text + "\n" for text in texts))


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
    """Breaks if a later part's skip hides an earlier part's result, or the other way round."""
    book(tmp_path)
    about = dict(group="all", prompt=prompt_hash(ROWS["a"]))
    write_part(tmp_path, 0, dict(id="a", skipped="gone"), dict(id="b", **about, p=1))
    write_part(tmp_path, 1, dict(id="a", **about, p=2), dict(id="b", skipped="gone"))
    lines = book(tmp_path).finish()
    assert lines["a"]["p"] == 2 and lines["b"]["p"] == 1


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
    assert again.blocks(2) == [] and [line["p"] for line in again.finish().values()] == [
        0,
        1,
        2,
        3,
        4,
    ]
