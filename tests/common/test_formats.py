"""common/formats.py: each published format, and what is wrong with a record."""

import json
import sys

import pytest

from common import formats
from common.formats import Clip, Frame, RecordError, Row

LATER = "THOUGHT 1: goes left {} THOUGHT 2: it falls"
HUMAN, GPT = (
    {"from": "human", "value": "<image><image>was – 次?"},
    {"from": "gpt", "value": LATER.format("<image>")},
)
V = "/m/v.mp4"
# format: (record, the Row it is: id, prompt, response, answer, question, options, group)
RECORDS = {  # media in "/m"
    "future-l1": (
        dict(
            id=7,
            video="v.mp4",
            image=[1, 3],
            reasoning_image=[5],
            group="g",
            options=["x", "y"],
            answer="y",
            conversations=[HUMAN, GPT],
        ),
        (
            "7",
            [Frame(V, 1), Frame(V, 3), "was – 次?"],
            ["goes left", Frame(V, 5), "it falls"],
            "y",
            "was – 次?",
            ["x", "y"],
            "g",
        ),
    ),
    "twiff": (
        dict(
            id="t",
            video="v.mp4",
            question="What next?",
            question_images_index=[2, 4],
            meta_data={"class": "c"},
            reasoning_images_index=[6],
            answer=LATER.format("<rimage>") + "<ans> a cup </ans>",
        ),
        (
            "t",
            [Frame(V, 2), Frame(V, 4), "What next?"],
            ["goes left", Frame(V, 6), "it falls"],
            "a cup",
            "What next?",
            None,
            "c",
        ),
    ),
    "twiff-bench": (
        dict(
            id="b",
            video="v.mp4",
            question="At <image> what?",
            question_images_index=[2],
            answer="a cup",
            reasoning_images_index=[6],
            question_images=[{"bytes": None, "path": "q.png"}],
            reasoning_images=["r.png"],
            meta_data={},
        ),
        ("b", ["At ", Frame("/m/q.png"), " what?"], [], "a cup", "At  what?", None, "all"),
    ),
    "futurebench": (
        dict(
            id=3,
            question_type="hop2",
            video_path="/data/x/video_dataset/a/v.mp4",
            qa=dict(Question="Who wins?", Options=dict(B="two", A="one"), Answer="B"),
        ),
        (
            "3",
            [Clip("/m/a/v.mp4"), "Who wins?\nA) one\nB) two"],
            [],
            "B",
            "Who wins?\nA) one\nB) two",
            ["one", "two"],
            "hop2",
        ),
    ),
    "rl": (
        dict(
            id="r", problem="<video>Who? <image>", answer=3, videos=["v.mp4"], images=["/abs/i.png"]
        ),
        ("r", [Clip(V), "Who? ", Frame("/abs/i.png")], [], "3", "Who?", None, "all"),
    ),
    "mcq": (
        dict(id="m", video="v.mp4", question="Who?", options=["one", "two"], answer="A"),
        (
            "m",
            [Clip(V), "Who?\nA) one\nB) two"],
            [],
            "A",
            "Who?\nA) one\nB) two",
            ["one", "two"],
            "all",
        ),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("layout", ["[{0}, {0}]", '{{"data": [{0}, {0}]}}', "{0}\n\n  \n{0}\n"])
def test_formats(name, layout, tmp_path):
    """A format told apart wrongly, a key misread, a marker or "THOUGHT n:" left over, a file layout
    not understood.
    """
    path = tmp_path / ("r.jsonl" if layout[-1] == "\n" else "r.json")
    path.write_text(
        layout.format(json.dumps(RECORDS[name][0], ensure_ascii=False)), encoding="utf-8"
    )
    rows = formats.read_rows(str(path), "/m")
    assert len(rows) == 2 and rows[0] == Row(f"{path}:0", *RECORDS[name][1])
    assert (
        str(tmp_path) in str(formats.read_rows(str(path))[0].prompt) or name == "rl"
    )  # media are beside the file


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrapped_answer_is_unwrapped(name):
    """Breaks if a gold answer in <answer> tags is compared, or taught, with its tags."""
    record = json.loads(json.dumps(RECORDS[name][0]))
    for holder, key in ((record, "answer"), (record.get("qa", {}), "Answer")):
        if key in holder and "<ans>" in str(holder[key]):
            holder[key] = holder[key].replace(" a cup ", "<answer> a cup </answer>")
        elif key in holder:
            holder[key] = f" <answer> {holder[key]}\n</answer> "
    assert formats.read_record(record, "f:0", "/m") == Row("f:0", *RECORDS[name][1])


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("so <answer> B </answer>.", "B"),
        ("<answer>B</answer><answer>C</answer>", "B"),
        ("<answer>B", "<answer>B"),
    ],
)
def test_a_gold_answer_in_tags_is_found_anywhere(answer, gold):
    """Breaks if tags count only around the whole answer: such a row could never be answered right.

    The official code searches, too.
    """
    row = formats.read_record(RECORDS["rl"][0] | dict(answer=answer), "f:0")
    assert row.answer == gold


PROBLEM = dict(problem="Which wall?", videos=["v.mp4"], answer="B")
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
    row = formats.read_record(PROBLEM | more, "f:0", "/m")
    wanted = [Clip(V), "Which wall?" + text]
    assert row.prompt == wanted + [LETTER] * letter and row.question == "Which wall?" + text
    assert row.options == (["red wall", "blue wall"] if text else None)


def test_a_problem_that_shows_and_asks_already():
    """Breaks if a problem that holds its options, or asks for the letter, has them twice."""
    asked = "Which wall?\nA. red wall\nB. blue wall\nGive only the single option letter."
    record = PROBLEM | dict(problem=asked, options=["A. red wall", "B. blue wall"])
    assert formats.read_record(record, "f:0", "/m").prompt == [Clip(V), asked]


def test_letters_are_taken_off_if_each_option_has_its_own():
    """Breaks if "A. B" among texts without letters loses its A, or "C. x" in another's place."""
    for options in (["A. B", "Green"], ["A. red", "C. blue"], ["A.", "B."]):
        record = PROBLEM | dict(options=options)
        assert formats.read_record(record, "f:0").options == options


@pytest.mark.parametrize("name", RECORDS)
def test_a_part_of_a_clip_in_every_format(name):
    """Breaks if `start` and `end` of a record are ignored: the model then sees the answer."""
    plain = formats.read_record(RECORDS[name][0], "f:0", "/m")
    row = formats.read_record(RECORDS[name][0] | dict(start=1, end=2.5), "f:0", "/m")
    parts = list(zip(row.prompt + row.response, plain.prompt + plain.response))
    of_clips = [(a, b) for a, b in parts if isinstance(b, Clip) or isinstance(b, Frame) and b.index]
    assert len(of_clips) == {"future-l1": 3, "twiff": 3, "twiff-bench": 0}.get(name, 1)
    for part, whole in parts:
        in_clip = (part, whole) in of_clips
        assert part == (whole._replace(start=1.0, end=2.5) if in_clip else whole)


@pytest.mark.parametrize("part", [dict(start="x"), dict(start=3, end=2), dict(start=-1)])
def test_a_part_that_is_none(part):
    """Breaks if a part that cannot be is read as the whole clip."""
    with pytest.raises(RecordError, match="^f:0: 'start'.*'end'"):
        formats.read_record(RECORDS["mcq"][0] | part, "f:0")


def test_keys_that_nothing_reads_are_named_once(tmp_path, capsys):
    """Breaks if a misspelt key passes in silence, a key of another format (`video` of an RL row,
    which would have no clip) is not told from one's own, or each record says so again.
    """
    path = tmp_path / "f.json"
    records = [RECORDS["mcq"][0] | dict(answr="B"), PROBLEM | dict(video="v.mp4"), PROBLEM]
    path.write_text(json.dumps(records))
    formats.read_rows(str(path))
    assert capsys.readouterr().out.startswith(f"{path}: these keys are not read: answr, video (")
    path.write_text(json.dumps([record for record, _ in RECORDS.values()]))
    formats.read_rows(str(path))
    assert capsys.readouterr().out == ""


def test_conversations_by_column():
    """Breaks if {from: [...], value: [...]} is refused, read in another order, or cut to the
    shorter.
    """
    record = RECORDS["future-l1"][0]
    columns = {key: [HUMAN[key], GPT[key]] for key in ("from", "value")}
    row = formats.read_record(record | dict(conversations=columns), "f:0", "/m")
    assert row == Row("f:0", *RECORDS["future-l1"][1])
    for broken in ({"from": ["human"]}, columns | {"from": ["human"]}, columns | {"value": "x"}):
        with pytest.raises(RecordError, match="^f:0: .*(from|value)"):
            formats.read_record(record | dict(conversations=broken), "f:0")


def test_class_of_twiff_bench():
    """Breaks if the released class is not what scores are split by, or the older names no longer
    count.
    """
    record, meta = RECORDS["twiff-bench"][0], dict(type="t", category="k", classification="x")
    meta["class"] = "c"
    for key in ("classification", "class", "category", "type"):
        for form in (meta, json.dumps(meta)):
            assert formats.read_record(record | dict(meta_data=form), "f:0").group == meta[key]
        del meta[key]


@pytest.mark.parametrize(
    "question, missing",
    [
        ("Who? A) one B) two", False),
        ("Who?\nA. one\nB. two", False),
        ("A dog or B?", True),
        ("Who?", True),
        ("Who? (A) one (B) two", False),
        ("Team A: red, team B: blue?", True),
    ],
)
def test_options_are_given_once(question, missing):
    """Options missing from the prompt make a question unanswerable; options given twice change the
    benchmark.
    """
    record = RECORDS["futurebench"][0]
    row = formats.read_record(record | dict(qa=record["qa"] | dict(Question=question)), "f:0")
    assert row.prompt[1] == question + ("\nA) one\nB) two" if missing else "") and row.options == [
        "one",
        "two",
    ]


def test_parquet(tmp_path, monkeypatch):
    """Of the hub's image columns {bytes, path} the bytes must win; without pyarrow the message
    names file and cure.
    """
    with (
        monkeypatch.context() as m,
        pytest.raises(RecordError, match=r"x\.parquet.*pip install pyarrow"),
    ):
        m.setitem(sys.modules, "pyarrow", None)
        formats.read_rows("x.parquet")
    record = RECORDS["twiff-bench"][0] | dict(
        question_images=[{"bytes": b"png", "path": "q.png"}], meta_data=None
    )
    assert formats.read_record(record, "f:0").prompt == ["At ", Frame(b"png"), " what?"]
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "r.parquet")
    assert formats.read_rows(str(tmp_path / "r.parquet"))[0].prompt == [
        "At ",
        Frame(b"png"),
        " what?",
    ]


@pytest.mark.parametrize(
    "name, key, value, message",
    [  # ... = the key is gone
        ("future-l1", "video", ..., "'video' is missing"),
        ("future-l1", "video", 3, "'video' should be str, found int"),
        ("future-l1", "answer", " ", "the answer is empty"),
        ("future-l1", "image", [0, 1], "'image' .*1..8.*0"),
        ("future-l1", "image", [1, 9], "'image' .*1..8.*9"),
        ("future-l1", "image", [1, "3"], "'image' .*1..8.*'3'"),
        ("future-l1", "image", [1, True], "'image' .*1..8"),
        ("future-l1", "image", "13", "'image' should be list"),
        ("future-l1", "image", [1], "2 <image> in the text but 1 entries in 'image'"),
        ("future-l1", "conversations", "hi", "'conversations' should be list"),
        (
            "future-l1",
            "conversations",
            [HUMAN, {"from": "bot", "value": "hi"}],
            "a turn should be .*bot",
        ),
        (
            "future-l1",
            "conversations",
            [HUMAN | dict(value="<image> <image>"), GPT],
            "the question is empty",
        ),
        ("future-l1", "options", ["x"], "2 to 26"),
        ("twiff", "question", ["q"], "'question' should be str"),
        ("twiff", "reasoning_images_index", ..., "'reasoning_images_index' is missing"),
        ("twiff", "answer", 4, "'answer' should be str"),
        ("twiff", "answer", "<ans>x</ans>", "0 <rimage> .* 1 entries"),
        ("twiff-bench", "question_images", [3], "'question_images' should hold paths"),
        ("twiff-bench", "question_images", "q.png", "'question_images' should be list"),
        ("futurebench", "qa", [], "'qa' should be dict"),
        ("futurebench", "question_type", ..., "'question_type' is"),
        ("futurebench", "qa", dict(Options=["a", "b"], Answer="A"), "'Question' is missing"),
        ("futurebench", "qa", dict(Question="q", Options=["a"], Answer="A"), "2 to 26"),
        ("rl", "answer", ..., "'answer' is missing"),
        ("rl", "images", [], "1 <image> .* 0 entries in 'images'"),
        ("rl", "images", [3], "'images' should hold paths"),
        ("rl", "images", "i", "'images' should"),
        ("rl", "videos", "v.mp4", "'videos' should"),
        ("rl", "videos", [3], "'videos' should"),
        ("mcq", "question", ..., "'question' is missing"),
        ("mcq", "options", {"A": "one"}, "2 to 26"),
        ("mcq", "options", None, "'options' should be list or dict"),
        ("mcq", "options", [], "2 to 26"),
        ("mcq", "options", ..., "unknown format .keys answer, id, question, video"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_malformed_records(name, key, value, message):
    """Each must be a RecordError with file, index and fault: a TypeError, or a row read askew,
    costs a night.
    """
    record = {k: v for k, v in (RECORDS[name][0] | {key: value}).items() if v is not ...}
    with pytest.raises(RecordError, match=rf"^f\.json:4: .*{message}"):
        formats.read_record(record, "f.json:4")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("f.json", b"", "f.json: no records"),
        ("f.jsonl", b"\n \n", "f.jsonl: no rec"),
        ("f.json", b"[]", "no records"),
        ("f.json", b"3", "f.json: expected a list of records, found int"),
        ("f.json", b"{'a': 1}", "f.json: not JSON"),
        ("f.json", b"[[1]]", "f.json:0: expected an object, found list"),
        ("f.json", b'{"data": []}', "no records"),
        ("f.jsonl", json.dumps(RECORDS["mcq"][0]).encode() + b'\n{"id": ', "f.jsonl:1: not JSON"),
        (
            "f.jsonl",
            json.dumps(RECORDS["mcq"][0]).encode() + b'\n{"id": 1}',
            "f.jsonl:1: unknown format .keys id",
        ),
        ("f.json", b"\x89PNG\xff\xfe\x00", r"f\.json.*: not (JSON|UTF-8|text)"),
    ],
    ids=range(10),
)
def test_malformed_files(name, content, message, tmp_path):
    """A file that is cut off, empty or something else altogether must say so and name the place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        formats.read_rows(str(tmp_path / name))


def test_a_line_that_is_not_json_is_one_bad_record(tmp_path):
    """Breaks if one torn line of a million ends the run, or shifts the numbers of later ones."""
    good, path = json.dumps(RECORDS["mcq"][0]), tmp_path / "f.jsonl"
    path.write_text(f'{good}\n{{"id": \n\n{good}\n')
    bad = []
    rows = formats.read_rows(str(path), bad=bad)
    assert [row.where for row in rows] == [f"{path}:0", f"{path}:2"]
    ((where, why),) = bad
    assert where == f"{path}:1" and why.startswith("not JSON (Expecting value")
    with pytest.raises(RecordError, match="f.jsonl:1: not JSON"):
        formats.read_rows(str(path))


def test_the_first_rank_alone_reports_bad_records(monkeypatch, capsys):
    """Breaks if eight ranks print the same list, or one of them goes on where the others end."""
    bad = [formats.Skipped("f:0", "why")]
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        formats.report_bad(bad, 2, 0.5)
        with pytest.raises(SystemExit, match="1 of 2 records"):
            formats.report_bad(bad, 2, 0.1)
        assert bool(capsys.readouterr().out) == printed


def test_bad_records_are_counted_and_named(tmp_path, capsys):
    """Breaks if a bad record ends the run, is left out unseen, or too many of them are let pass."""
    good, path = RECORDS["mcq"][0], tmp_path / "f.json"
    content = [good, good | dict(answer=""), 3, good, good | dict(answer=" ")]
    path.write_text(json.dumps(content))
    bad = []
    rows = formats.read_rows(str(path), bad=bad)
    assert [row.where for row in rows] == [f"{path}:0", f"{path}:3"]
    empty = "the answer is empty"
    other = "expected an object, found int"
    assert bad == [(f"{path}:1", empty), (f"{path}:2", other), (f"{path}:4", empty)]
    with pytest.raises(RecordError, match="f.json:1: the answer is empty"):
        formats.read_rows(str(path))

    formats.report_bad([], 5, 0.0)
    assert capsys.readouterr().out == ""
    formats.report_bad(bad, 5, 0.6)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed[0].startswith("3 of 5 records")
    assert printed[1:] == [f"2 {empty}", f"1 {other}", *(f"{where}: {why}" for where, why in bad)]
    for total, share in ((5, 0.59), (3, 1.0)):
        with pytest.raises(SystemExit, match=f"3 of {total} records"):
            formats.report_bad(bad, total, share)
