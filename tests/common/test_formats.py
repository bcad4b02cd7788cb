"""common/formats.py: each published format, and what is wrong with a record."""

import json
import math
import re
import sys

import pytest

from common import formats
from common.formats import Clip, Frame, RecordError, Row, read_record, read_rows

V = "/m/v.mp4"
LATER = "THOUGHT 1: goes left {} THOUGHT 2: it falls"
HUMAN = {"from": "human", "value": "<image><image>was – 次?"}
GPT = {"from": "gpt", "value": LATER.format("<image>")}
STEPS = ["goes left", Frame(V, 5), "it falls"]
SEEN, TWO = Clip(V, 0.0, 2.5), "Who?\nA) one\nB) two"
MOMENTS = ["goes left", Frame(V, 1, 3.0, 3.0), "it", Frame(V, 1, 4.5, 4.5), "falls"]


def talk(**more):
    record = dict(
        id=7, video="v.mp4", image=[1, 3], reasoning_image=[5], conversations=[HUMAN, GPT]
    )
    return record | dict(group="g", options=["x", "y"], answer="y") | more


def clip_talk(**more):
    human = HUMAN | dict(value="<video>was – 次?")
    gpt = GPT | dict(value=LATER.format("<image>").replace("it falls", "it <image> falls"))
    record = dict(talk(), conversations=[human, gpt], observed=[0, 2.5], future=[3, 4.5])
    del record["image"], record["reasoning_image"]
    return record | more


def twiff(**more):
    record = dict(id="t", video="v.mp4", question="Next?", question_images_index=[2, 4])
    record |= dict(reasoning_images_index=[5], meta_data={"class": "c"})
    return record | dict(answer=LATER.format("<rimage>") + "<ans> a cup </ans>") | more


def bench(**more):
    pictures = dict(question_images=[{"bytes": None, "path": "q.png"}], reasoning_images=["r.png"])
    record = twiff(id="b", question="At <image> what?", question_images_index=[2], answer="a cup")
    return record | pictures | dict(meta_data={}) | more


def futurebench(question="Who?", **more):
    qa = dict(Question=question, Options=dict(B="two", A="one"), Answer="B")
    path = "/data/x/video_dataset/a/v.mp4"
    return dict(id=3, question_type="hop2", video_path=path, qa=qa) | more


def rl(**more):
    record = dict(id="r", problem="<video>Who? <image>", answer=3)
    return record | dict(videos=["v.mp4"], images=["/abs/i.png"]) | more


def mcq(**more):
    return dict(id="m", video="v.mp4", question="Who?", options=["one", "two"], answer="A") | more


# format: (a record, the Row it is: id, prompt, response, answer, question, options, group)
RECORDS = {
    talk: ("7", [Frame(V, 1), Frame(V, 3), "was – 次?"], STEPS, "y", "was – 次?", ["x", "y"], "g"),
    clip_talk: ("7", [SEEN, "was – 次?"], MOMENTS, "y", "was – 次?", ["x", "y"], "g"),
    twiff: ("t", [Frame(V, 2), Frame(V, 4), "Next?"], STEPS, "a cup", "Next?", None, "c"),
    bench: ("b", ["At ", Frame("/m/q.png"), " what?"], [], "a cup", "At  what?", None, "all"),
    futurebench: ("3", [Clip("/m/a/v.mp4"), TWO], [], "B", TWO, ["one", "two"], "hop2"),
    rl: ("r", [Clip(V), "Who? ", Frame("/abs/i.png")], [], "3", "Who?", None, "all"),
    mcq: ("m", [Clip(V), TWO], [], "A", TWO, ["one", "two"], "all"),
}
each_format = pytest.mark.parametrize("make", RECORDS, ids=lambda make: make.__name__)


@each_format
@pytest.mark.parametrize("layout", ["[{0}, {0}]", '{{"data": [{0}, {0}]}}', "{0}\n\n  \n{0}\n"])
def test_formats(make, layout, tmp_path):
    """Breaks if a format is told apart wrongly, a key misread, a marker or "THOUGHT n:" left over,
    a file layout not understood, or media are not looked for beside the file.
    """
    path = tmp_path / ("r.jsonl" if layout[-1] == "\n" else "r.json")
    path.write_text(layout.format(json.dumps(make(), ensure_ascii=False)), encoding="utf-8")
    rows = read_rows(str(path), "/m")
    assert len(rows) == 2 and rows[0] == Row(f"{path}:0", *RECORDS[make])
    assert str(tmp_path) in str(read_rows(str(path))[0].prompt)


@pytest.mark.parametrize("make", [make for make in RECORDS if make is not clip_talk])
def test_a_part_of_a_clip_in_every_format(make):
    """Breaks if `start` and `end` of a record are ignored: the model then sees the answer."""
    row, part = (read_record(make(**more), "f:0", "/m") for more in ({}, dict(start=1, end=2.5)))
    cut = 0
    for whole, found in zip(row.prompt + row.response, part.prompt + part.response, strict=True):
        if isinstance(whole, Clip) or isinstance(whole, Frame) and whole.index:
            whole, cut = whole._replace(start=1.0, end=2.5), cut + 1
        assert found == whole
    assert cut == {talk: 3, twiff: 3, bench: 0}.get(make, 1)


@pytest.mark.parametrize(
    "answer, gold",
    [("so <answer> B\n</answer>.", "B"), ("<answer>B</answer><answer>C</answer>", "B")]
    + [("<answer>B", "<answer>B")],
)
def test_tags_are_found_anywhere(answer, gold):
    """Breaks if a gold answer in <answer> tags keeps them, or if they count only around a whole
    answer: such a row could never be answered right. The official code searches, too.
    """
    assert read_record(rl(answer=answer), "f:0").answer == gold


SHOWN, LETTER = "\nA) red wall\nB) blue wall", formats.ASK_LETTER


@pytest.mark.parametrize(
    "more, text, letter",
    [
        (dict(options=["A. red wall", "B. blue wall"]), SHOWN, True),
        (dict(options=["(A) red wall", "(B) blue wall"]), SHOWN, True),
        (dict(options={"B": "blue wall", "A": "red wall"}), SHOWN, True),
        (dict(problem_type="Multiple choice "), "", True),
        (dict(problem_type="free-form", options=[]), "", False),
        (dict(), "", False),
    ],
)
def test_rl_rows_show_their_options(more, text, letter):
    """Breaks if RL asks for one of texts that the model has not seen, or shows their letters twice,
    or if multiple choice is not asked for a letter (the official code asks by problem_type).
    """
    row = read_record(dict(problem="Which?", videos=["v.mp4"], answer="B") | more, "f:0", "/m")
    assert row.prompt == [Clip(V), "Which?" + text] + [LETTER] * letter
    assert row.question == "Which?" + text
    assert row.options == (["red wall", "blue wall"] if text else None)


def test_a_problem_that_shows_and_asks_already():
    """Breaks if a problem that holds its options, or asks for the letter, has them twice."""
    asked = "Which?\nA. red wall\nB. blue wall\nGive only the single option letter."
    record = dict(problem=asked, options=["A. red wall", "B. blue wall"], answer="B")
    assert read_record(record, "f:0").prompt == [asked]


@pytest.mark.parametrize("options", [["A. B", "Green"], ["A. red", "C. blue"], ["A.", "B."]])
def test_letters_are_taken_off_if_each_option_has_its_own(options):
    """Breaks if "A. B" among texts without letters loses its A, or "C. x" in another's place."""
    assert read_record(mcq(options=options), "f:0").options == options


@pytest.mark.parametrize(
    "question, missing",
    [
        ("Who? A) one B) two", False),
        ("Who?\nA. one\nB. two", False),
        ("Who? (A) one (B) two", False),
        ("A dog or B?", True),
        ("Who?", True),
        ("Team A: red, team B: blue?", True),
    ],
)
def test_options_are_given_once(question, missing):
    """Breaks if options are missing from the prompt, so that none can answer, or given twice."""
    row = read_record(futurebench(question), "f:0")
    assert row.prompt[1] == question + ("\nA) one\nB) two" if missing else "")
    assert row.options == ["one", "two"]


def test_options_by_number_stand_in_the_order_of_their_numbers():
    """Breaks if options that are given by number are sorted as words: 1, 10, 2."""
    texts = {str(k): f"text {k}" for k in (10, 2, 3, 4, 5, 6, 7, 8, 9, 1)}
    row = read_record(mcq(options=texts, answer="text 10"), "f:0")
    assert row.options == [f"text {k}" for k in range(1, 11)]


@pytest.mark.parametrize("answer, fault", [("x", False), ("B", False), ("z", True), ("C", True)])
def test_an_answer_that_is_none_of_its_options(answer, fault):
    """Breaks if such a row is taken for a sound one, or the message does not say which."""
    row = read_record(talk(answer=answer), "f:0")
    found = formats.no_option(row)
    assert found == (("f:0", f"the answer {answer!r} is none of ['x', 'y']") if fault else None)
    assert formats.no_option(read_record(rl(), "f:1")) is None


def test_conversations_by_column():
    """Breaks if {from: [...], value: [...]} is refused, read in another order, or cut short."""
    columns = {key: [HUMAN[key], GPT[key]] for key in ("from", "value")}
    assert read_record(talk(conversations=columns), "f", "/m") == Row("f", *RECORDS[talk])
    for broken in ({"from": ["human"]}, columns | {"from": ["human"]}, columns | {"value": "x"}):
        with pytest.raises(RecordError, match="^f:0: .*(from|value)"):
            read_record(talk(conversations=broken), "f:0")


def test_class_of_twiff_bench():
    """Breaks if the released class is not what scores are split by, or older names do not count."""
    meta = {"type": "t", "category": "k", "classification": "x", "class": "c"}
    for key in ("classification", "class", "category", "type"):
        for form in (meta, json.dumps(meta)):
            assert read_record(bench(meta_data=form), "f:0").group == meta[key]
        del meta[key]


def test_parquet(tmp_path, monkeypatch):
    """Breaks if of the hub's image columns {bytes, path} the bytes do not win, or without pyarrow
    the message does not name file and cure.
    """
    with monkeypatch.context() as m, pytest.raises(RecordError, match=r"x\.parquet.*pip install"):
        m.setitem(sys.modules, "pyarrow", None)
        read_rows("x.parquet")
    record = bench(question_images=[{"bytes": b"png", "path": "q.png"}], meta_data=None)
    record.update(id=None, group=None)
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "r.parquet")
    for row in (read_record(record, "f:0"), *read_rows(str(tmp_path / "r.parquet"))):
        assert row.prompt == ["At ", Frame(b"png"), " what?"]
        assert row.id == row.where and row.group == "all"


BAD = [  # ... = the key is gone
    (talk, "video", ..., "'video' is missing .*docs/data.md"),
    (talk, "video", 3, "'video' should be str, found int"),
    (talk, "answer", " ", "the answer is empty"),
    *[(talk, "image", image, "'image' .*1..8") for image in ([0, 1], [1, 9], [1, "3"], [1, True])],
    (talk, "image", "13", "'image' should be list"),
    (talk, "image", [1], "2 <image> in the text but 1 entries in 'image'"),
    (talk, "conversations", "hi", "'conversations' should be list"),
    (talk, "conversations", [HUMAN, {"from": "bot", "value": "hi"}], "a turn should be .*bot"),
    (talk, "conversations", [HUMAN | dict(value="<image> <image>"), GPT], "the question is empty"),
    (talk, "options", ["x"], "2 to 26"),
    (clip_talk, "observed", [0], "'observed' should be .a, b. with 0 <= a < b, found .0."),
    (clip_talk, "observed", [2, 2], "'observed' should be"),
    (clip_talk, "observed", [0, "2"], "should hold seconds"),
    (clip_talk, "observed", [0, math.inf], "should hold seconds"),
    *[(clip_talk, "future", [3, t], "should hold seconds") for t in (math.nan, math.inf, 10**400)],
    (clip_talk, "future", [2.4, 3], "'future' .2.4, 3. begins before 'observed' .* ends"),
    (clip_talk, "future", [3], "2 <image> in the text but 1 entries in 'future'"),
    (clip_talk, "future", ..., "'future' is missing"),
    (clip_talk, "start", 1, "'observed' does not go with 'start'"),
    (clip_talk, "image", [1], "'observed' does not go with 'image'"),
    (talk, "start", "x", "'start' and 'end' should be seconds"),
    (twiff, "question", ["q"], "'question' should be str"),
    (twiff, "reasoning_images_index", ..., "'reasoning_images_index' is missing"),
    (twiff, "answer", 4, "'answer' should be str"),
    (twiff, "answer", "<ans>x</ans>", "0 <rimage> .* 1 entries"),
    (twiff, "answer", "<rimage> x", "a chain without a closed <ans>"),
    (twiff, "meta_data", "{", "'meta_data' is not JSON"),
    (bench, "question_images", [3], "'question_images' should hold paths"),
    (bench, "question_images", "q.png", "'question_images' should be list"),
    (futurebench, "qa", [], "'qa' should be dict"),
    (futurebench, "question_type", ..., "'question_type' is"),
    (futurebench, "qa", dict(Options=["a", "b"], Answer="A"), "'Question' is missing"),
    (futurebench, "qa", dict(Question="q", Options=["a"], Answer="A"), "2 to 26"),
    (rl, "answer", ..., "'answer' is missing"),
    (rl, "images", [], "1 <image> .* 0 entries in 'images'"),
    (rl, "images", [3], "'images' should hold paths"),
    (rl, "images", "i", "'images' should"),
    (rl, "videos", "v.mp4", "'videos' should"),
    (rl, "videos", [3], "'videos' should"),
    (rl, "problem", "<image> \ud800", "not valid Unicode"),
    (mcq, "question", ..., "'question' is missing"),
    (mcq, "options", {"A": "one"}, "2 to 26"),
    (mcq, "options", [], "2 to 26"),
    (mcq, "options", None, "'options' should be list or dict"),
    (mcq, "options", ..., "unknown format .keys answer, id, question, video.*docs/data.md"),
    *[(mcq, "end", end, f"'start' is 0.0, 'end' {end}.*") for end in (-1, 0, math.nan)],
    (mcq, "start", 10**400, "'start' and 'end' should be seconds"),
]


@pytest.mark.parametrize(
    "make, key, value, message", BAD, ids=lambda x: getattr(x, "__name__", str(x)[:20])
)
def test_malformed_records(make, key, value, message):
    """Breaks if one is no RecordError with file, index and fault: a TypeError ends a run, and a row
    that is read askew is not noticed at all.
    """
    record = {k: v for k, v in make(**{key: value}).items() if v is not ...}
    with pytest.raises(RecordError, match=rf"^f\.json:4: .*{message}"):
        read_record(record, "f.json:4")


GOOD = json.dumps(mcq()).encode()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("f.json", b"", "f.json: no records"),
        ("f.jsonl", b"\n \n", "f.jsonl: no rec"),
        ("f.json", b"[]", "no records"),
        ("f.json", b"3", "f.json: expected a list of records, found int"),
        ("f.json", b"{'a': 1}", "f.json: not JSON"),
        ("f.json", b"[" * 100_000, "f.json: not JSON"),
        ("f.jsonl", b"1" * 5000, "f.jsonl:0: not JSON"),
        ("f.json", b"[[1]]", "f.json:0: expected an object, found list"),
        ("f.json", b'{"data": []}', "no records"),
        ("f.jsonl", GOOD + b'\n{"id": ', "f.jsonl:1: not JSON"),
        ("f.jsonl", GOOD + b'\n{"id": 1}', "f.jsonl:1: unknown format .keys id"),
        ("f.json", b"\x89PNG\xff\xfe\x00", r"f\.json.*: not (JSON|UTF-8|text)"),
        ("f.parquet", b"PAR", r"f\.parquet: not a parquet file"),
    ],
    ids=range(13),
)
def test_malformed_files(name, content, message, tmp_path):
    """Breaks if a file that is cut off, empty or something else does not say so with its place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_rows(str(tmp_path / name))


def test_bad_records_are_counted_and_named(tmp_path, capsys, monkeypatch):
    """Breaks if a bad record ends the run, is left out unseen or shifts the numbers of later ones,
    if too many of them are let pass, or if eight ranks print the same list.
    """
    path = tmp_path / "f.jsonl"
    lines = [json.dumps(record) for record in (mcq(), mcq(answer=""), 3, mcq(), mcq(answer=" "))]
    path.write_text("\n".join([*lines, '{"id": ']))
    bad = []
    rows = read_rows(str(path), bad=bad)
    assert [row.where for row in rows] == [f"{path}:0", f"{path}:3"]
    empty, other = "the answer is empty", "expected an object, found int"
    assert bad[:3] == [(f"{path}:1", empty), (f"{path}:2", other), (f"{path}:4", empty)]
    assert bad[3].where == f"{path}:5" and bad[3].why.startswith("not JSON (Expecting value")
    with pytest.raises(RecordError, match=f"{re.escape(str(path))}:1: the answer is empty"):
        read_rows(str(path))

    formats.report_bad([], 5, 0.0)
    assert capsys.readouterr().out == ""
    formats.report_bad(bad[:3], 5, 0.6)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed[0].startswith("3 of 5 records") and printed[1:3] == [f"2 {empty}", f"1 {other}"]
    assert printed[3:] == [f"{where}: {why}" for where, why in bad[:3]]
    for rank, total, share in (("0", 5, 0.59), ("0", 3, 1.0), ("1", 5, 0.59)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match=f"3 of {total} records"):
            formats.report_bad(bad[:3], total, share)
        assert bool(capsys.readouterr().out) == (rank == "0")


def test_keys_that_nothing_reads_are_named_once(tmp_path, capsys):
    """Breaks if a misspelt key passes in silence, a key of another format (`video` of an RL row,
    which would have no clip) is taken for one of its own, or each record says so again.
    """
    path = tmp_path / "f.json"
    path.write_text(json.dumps([mcq(answr="B"), rl(video="v.mp4"), rl(video="v.mp4")]))
    read_rows(str(path))
    assert capsys.readouterr().out.startswith(f"{path}: no format has these keys: answr, video (")
    path.write_text(json.dumps([make() for make in RECORDS]))
    read_rows(str(path))
    assert capsys.readouterr().out == ""
