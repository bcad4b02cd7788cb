"""Record formats: JSON, JSON lines, parquet -> Row. docs/data.md shows a record of each.

Where this differs from the official code:
 1. A multiple-choice question of RL ends with a sentence that asks for the letter, as official's
    does, but the words are ours, rows with `options` get it whatever their problem_type, and it is
    left out where the question asks for an "option letter" itself.
 2. One bad record never ends a run that is on its way: it is counted, named and left out.
"""

import collections
import dataclasses
import json
import math
import os
import re
from typing import NamedTuple

# ours; the official code appends a sentence to the same effect
ASK_LETTER = (
    "\nReply with the letter of the right option only, and put it between <answer> and </answer>."
)


class RecordError(ValueError):
    """A record that cannot be used: the message names its file, its index and what was expected."""


class Clip(NamedTuple):
    """A clip that enters as a video: frames spread over all or part of it, with time stamps."""

    path: str
    start: float = 0.0  # seconds
    end: float = math.inf


class Frame(NamedTuple):
    """One image of a prompt or a future.

    Key frame `index` (1..8) of a clip, or of its part from start to end. If start and end are the
    same moment, that part is one frame, key frame 1. Or a whole image file (index 0).
    """

    source: str | bytes  # path, or the image file's bytes
    index: int = 0
    start: float = 0.0  # seconds
    end: float = math.inf

    @property
    def clip(self):
        """The Clip of which this is a key frame."""
        return Clip(self.source, self.start, self.end)


@dataclasses.dataclass
class Row:
    """The one normal form of all formats."""

    where: str  # "file:index", for every message
    id: str
    prompt: list  # str | Frame | Clip, in the order of the user turn
    response: list  # str (a reasoning step) | Frame (a future to imagine); may be empty
    answer: str
    question: str = ""  # the prompt's text, options included, without ASK_LETTER
    options: list | None = None  # texts of A, B, C ..., without their letters
    group: str = "all"  # what scores are split by

    @property
    def futures(self):
        """The Frames that really came, which the model is to imagine."""
        return [part for part in self.response if isinstance(part, Frame)]


class Skipped(NamedTuple):
    """A sample that could not be used, and why."""

    where: str
    why: str


def read_rows(path, media_root=None, bad=None):
    """A .json, .jsonl or .parquet file -> list of Row. Source: the published formats.

    media_root: where relative clip paths start; default: the folder of the file. bad: a list that
    gets a Skipped for each record that cannot be used; None: the first one raises RecordError,
    which names the file, the index and what is missing. Raises RecordError too if the file is no
    list of records or empty, FileNotFoundError if there is none.
    """
    media_root = os.path.dirname(os.path.abspath(path)) if media_root is None else media_root
    records, rows = read_records(path), []
    if not records:
        raise RecordError(f"{path}: no records")
    name_unknown_keys(path, records)
    for i, record in enumerate(records):
        where = f"{path}:{i}"
        try:
            rows.append(read_record(record, where, media_root))
        except RecordError as e:
            if bad is None:
                raise
            # deviation 2: the caller says how many are too many (`report_bad`)
            bad.append(Skipped(where, str(e).removeprefix(f"{where}: ")))
    return rows


def report_bad(bad, total, max_bad, fate="cannot be used and are left out"):
    """Say how many of `total` records were left out, by reason, and name each.

    bad: list of Skipped. Of several ranks the first one prints. Raises SystemExit on each if all
    are bad, or more than the share max_bad (0..1).
    """
    if not bad:
        return
    reasons = collections.Counter(why for _, why in bad)
    lines = [f"{len(bad)} of {total} records {fate}:"]
    lines += [f"{count:6} {why}" for why, count in reasons.most_common()]
    lines += [f"{where}: {why}" for where, why in bad]
    say("\n".join(lines))
    if len(bad) == total or len(bad) > max_bad * total:
        raise SystemExit(
            f"{len(bad)} of {total} records {fate}, more than max_bad = {max_bad} allows; "
            f"the first: {bad[0].where}: {bad[0].why}"
        )


def say(text):
    """Print, of several ranks on the first alone."""
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        print(text)


def read_records(path):
    """A .json, .jsonl or .parquet file -> its records as they stand.

    A line of a .jsonl file that is not JSON becomes the RecordError that `read_record` raises for
    it. Raises RecordError for a file that cannot be read as a whole, FileNotFoundError.
    """
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise RecordError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from e
        with open(path, "rb") as f:
            try:
                return pyarrow.parquet.read_table(f).to_pylist()
            except pyarrow.ArrowException as e:
                raise RecordError(f"{path}: not a parquet file ({e})") from e
    with open(path, encoding="utf-8") as f:
        try:
            text = f.read()
        except UnicodeDecodeError as e:
            raise RecordError(f"{path}: not UTF-8 text ({e})") from e
    if path.endswith(".jsonl"):
        lines = [line for line in text.split("\n") if line.strip()]
        return [_parse(line, f"{path}:{i}") for i, line in enumerate(lines)]
    if not text.strip():
        return []
    records = _parse(text, path)
    if isinstance(records, RecordError):
        raise records
    if isinstance(records, dict):  # {"data": [...]} or {id: record}
        data = records.get("data")
        records = data if isinstance(data, list) else list(records.values())
    if not isinstance(records, list):
        raise RecordError(f"{path}: expected a list of records, found {type(records).__name__}")
    return records


def _parse(text, where):
    """JSON -> its content, or the RecordError that says why not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # also a number or a nesting beyond Python's limits
        return RecordError(f"{where}: not JSON ({e})")


class Record:
    """One JSON object with its place and its media folder; each lookup raises RecordError."""

    def __init__(self, content, where, media_root):
        self.content, self.where, self.media_root = content, where, media_root

    def fault(self, text):
        return RecordError(f"{self.where}: {text}")

    def need(self, key, types, of=None):
        """The value of a key, of one of the types; `of`: an object inside the record."""
        of = self.content if of is None else of
        if key not in of:
            found = ", ".join(sorted(of))
            raise self.fault(
                f"key {key!r} is missing (found {found}); docs/data.md shows each format"
            )
        value = of[key]
        if not isinstance(value, types):
            types = types if isinstance(types, tuple) else (types,)
            names = " or ".join(t.__name__ for t in types)
            raise self.fault(
                f"{key!r} should be {names}, found {type(value).__name__}: {value!r:.60}"
            )
        return value

    def has(self, key):
        """Whether a key has a value; in parquet each record has all keys."""
        return self.content.get(key) is not None

    def path(self, name, key):
        """A path of the record, found at `key` -> a path on this machine."""
        if not isinstance(name, str):
            raise self.fault(f"{key!r} should hold paths or image bytes, found {name!r:.60}")
        return os.path.join(self.media_root, name)  # an absolute path stays as it is

    def clip(self, name, key="video"):
        """A clip, or the part of it from the record's `start` to its `end`, in seconds."""
        try:
            start = float(self.content["start"] if self.has("start") else 0)
            end = float(self.content["end"] if self.has("end") else math.inf)
        except (TypeError, ValueError, OverflowError) as e:
            raise self.fault(f"'start' and 'end' should be seconds ({e})") from e
        if not 0 <= start < end:
            raise self.fault(f"'start' is {start}, 'end' {end}: expected 0 <= start < end")
        return Clip(self.path(name, key), start, end)

    def key_frames(self, key):
        """A list of key-frame numbers 1..8 of the record's `video` -> Frames."""
        numbers = self.need(key, list)
        if not all(type(i) is int and 1 <= i <= 8 for i in numbers):
            raise self.fault(f"{key!r} should hold key-frame numbers 1..8, found {numbers}")
        clip = self.clip(self.need("video", str))
        return [Frame(clip.path, i, clip.start, clip.end) for i in numbers]

    def observed(self):
        """`observed` [a, b] and `future` [t, ...], in seconds -> the Clip from a to b, Frames."""
        others = [k for k in ("image", "reasoning_image", "start", "end") if self.has(k)]
        if others:
            raise self.fault(f"'observed' does not go with {', '.join(map(repr, others))}")
        observed, times = self.need("observed", list), self.need("future", list)
        # the bound also refuses NaN, which is not below anything, and infinity
        if not all(type(t) in (int, float) and abs(t) < 1e9 for t in (*observed, *times)):
            raise self.fault(f"'observed' and 'future' should hold seconds: {observed}, {times}")
        if len(observed) != 2 or not 0 <= observed[0] < observed[1]:
            raise self.fault(f"'observed' should be [a, b] with 0 <= a < b, found {observed}")
        if min(times, default=observed[1]) < observed[1]:
            raise self.fault(f"'future' {times} begins before 'observed' {observed} ends")
        path = self.path(self.need("video", str), "video")
        return Clip(path, *map(float, observed)), [Frame(path, 1, t, t) for t in map(float, times)]

    def pictures(self, key):
        """A list of whole pictures: paths, bytes or the hub's {bytes, path} -> Frames."""
        frames = []
        for picture in self.need(key, list):
            if isinstance(picture, dict):
                picture = picture.get("bytes") or picture.get("path")
            if not isinstance(picture, bytes):
                picture = self.path(picture, key)
            frames.append(Frame(picture))
        return frames


def read_record(record, where, media_root="."):
    """One JSON object, as `read_records` gives it -> Row. `where` names it in errors.

    Raises RecordError.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError(f"{where}: expected an object, found {type(record).__name__}")
    read, _ = format_of(record)
    # in parquet a record without one of these has it as None
    id, group = record.get("id"), record.get("group")
    row = Row(where, where if id is None else str(id), [], [], "")
    row.group = "all" if group is None else str(group)
    if record.get("options"):
        row.options = _options(record["options"], where)
    if read is None:
        raise RecordError(
            f"{where}: unknown format (keys {', '.join(sorted(map(str, record)))}); expected one "
            f"of docs/data.md, which are told apart by {', '.join(FORMATS)}"
        )
    read(Record(record, where, media_root), row)

    # what holds for all formats
    row.answer = str(row.answer).strip()
    in_tags = answer_of(row.answer)
    row.answer = row.answer if in_tags is None else in_tags
    texts = [part for part in row.prompt if isinstance(part, str) and part != ASK_LETTER]
    row.question = "".join(texts).strip()
    for name in ("question", "answer"):
        if not getattr(row, name):
            raise RecordError(f"{where}: the {name} is empty")
    try:
        "".join(p for p in (*row.prompt, *row.response, row.answer) if isinstance(p, str)).encode()
    except UnicodeEncodeError as e:
        raise RecordError(f"{where}: the text is not valid Unicode ({e})") from e
    return row


def _future_l1(record, row):
    content, seen = record.content, []
    record.need("video", str)
    if record.has("observed"):
        clip, future = record.observed()
        row.prompt, keys = [clip], ("observed", "future")
    else:
        keys = "image", "reasoning_image"
        seen, future = (record.key_frames(key) if record.has(key) else [] for key in keys)
    turns = {"human": "", "gpt": ""}
    for turn in _turns(record):
        if (
            not isinstance(turn, dict)
            or turn.get("from") not in turns
            or not isinstance(turn.get("value"), str)
        ):
            raise record.fault(
                f"a turn should be {{from: human|gpt, value: text}}, found {turn!r:.80}"
            )
        turns[turn["from"]] += turn["value"]
    chain, answer = _split_answer(turns["gpt"], "answer")
    human = turns["human"]
    human = human.replace("<video>", "") if row.prompt else human  # the clip comes first
    row.prompt += _interleave(human, "<image>", seen, row.where, keys[0])
    row.response = _steps(_interleave(chain, "<image>", future, row.where, keys[1]))
    if answer is None or "answer" in content:
        answer = record.need("answer", (str, int, float))
    row.answer = answer


def _turns(record):
    """The turns of `conversations`: [{from, value}] or, in some exports, {from: [], value: []}."""
    turns = record.need("conversations", (list, dict))
    if isinstance(turns, list):
        return turns
    senders, values = (record.need(key, list, turns) for key in ("from", "value"))
    if len(senders) != len(values):
        raise record.fault(f"'conversations' holds {len(senders)} 'from' but {len(values)} 'value'")
    return [{"from": sender, "value": value} for sender, value in zip(senders, values)]


def _twiff(record, row):
    """TwiFF, and TwiFF-Bench, which ships the pictures themselves."""
    seen = record.key_frames("question_images_index")
    future = record.key_frames("reasoning_images_index")
    if record.content.get("question_images"):
        seen = record.pictures("question_images")
    if record.content.get("reasoning_images"):
        future = record.pictures("reasoning_images")
    question = record.need("question", str)
    chain, answer = _split_answer(record.need("answer", str), "ans")
    if "<image>" not in question:
        question = "<image>" * len(seen) + question
    row.prompt = _interleave(question, "<image>", seen, row.where, "question_images_index")
    if answer is None:  # no chain: the answer alone
        if "<rimage>" in chain or "<ans>" in chain:
            raise record.fault("'answer' holds a chain without a closed <ans>...</ans>")
        row.answer = chain
    else:
        row.answer = answer
        row.response = _steps(
            _interleave(chain, "<rimage>", future, row.where, "reasoning_images_index")
        )
    row.group = _class(record, row.group)


def _class(record, default):
    """What scores are split by: a value of meta_data, an object or its JSON text."""
    meta = record.content.get("meta_data")
    if isinstance(meta, str) and meta.lstrip().startswith("{"):
        try:
            meta = json.loads(meta)
        except json.JSONDecodeError as e:
            raise record.fault(f"'meta_data' is not JSON ({e})") from e
    if not isinstance(meta, dict):
        return default
    keys = ("classification", "class", "category", "type")  # the first: TwiFF-Bench as released
    return str(next((meta[key] for key in keys if key in meta), "all"))


def _futurebench(record, row):
    qa = record.need("qa", dict)
    row.options = _options(record.need("Options", (dict, list), qa), row.where)
    row.answer, row.group = record.need("Answer", str, qa), record.need("question_type", str)
    name = record.need("video_path", str).split("video_dataset/")[-1]
    question = record.need("Question", str, qa)
    row.prompt = [record.clip(name), _with_options(question, row.options)]


def _rl(record, row):
    row.answer = record.need("answer", (str, int, float))
    images = record.pictures("images") if record.has("images") else []
    videos = record.need("videos", list) if record.has("videos") else []
    text = record.need("problem", str).replace("<video>", "")
    text = "<image>" * len(images) + text if "<image>" not in text else text
    text = _with_options(text, row.options or [])
    row.prompt = [record.clip(name, "videos") for name in videos]
    row.prompt += _interleave(text, "<image>", images, row.where, "images")

    # deviation 1: official goes by problem_type alone
    kind = str(record.content.get("problem_type", "")).strip().lower()
    if (row.options or kind == "multiple choice") and "option letter" not in text.lower():
        row.prompt.append(ASK_LETTER)


def _mcq(record, row):
    row.options = _options(record.need("options", (list, dict)), row.where)
    row.answer = record.need("answer", (str, int))
    clip = record.clip(record.need("video", str))
    row.prompt = [clip, _with_options(record.need("question", str), row.options)]


FORMATS = {  # the key that tells a format (the first that fits), its reader, its other keys
    "conversations": (_future_l1, "video image reasoning_image observed future answer cot"),
    "question_images_index": (
        _twiff,
        "video question answer reasoning_images_index question_images reasoning_images",
    ),
    "qa": (_futurebench, "question_type video_path"),
    "problem": (_rl, "answer images videos problem_type"),
    "options": (_mcq, "video question answer"),
}
COMMON_KEYS = {*FORMATS, "id", "group", "start", "end", "meta_data"}


def format_of(record):
    """A JSON object -> the reader of its format or None, the keys that are read."""
    for key, (reader, others) in FORMATS.items():
        if key in record:
            return reader, COMMON_KEYS | set(others.split())
    return None, COMMON_KEYS


def name_unknown_keys(path, records):
    """Print once which keys of a file's records no format has: a misspelt one changes the data."""
    unknown = set()
    for record in records:
        if isinstance(record, dict):
            unknown |= set(map(str, record)) - format_of(record)[1]
    if unknown:
        say(f"{path}: no format has these keys: {', '.join(sorted(unknown))} (see docs/data.md)")


def _interleave(text, marker, frames, where, key):
    pieces = text.split(marker)
    if len(pieces) - 1 != len(frames):
        raise RecordError(
            f"{where}: {len(pieces) - 1} {marker} in the text but {len(frames)} entries in {key!r}"
        )
    out = []
    for piece, frame in zip(pieces, [*frames, None]):
        out += ([piece] if piece.strip() else []) + ([frame] if frame is not None else [])
    return out


def _steps(pieces):
    """Strip "THOUGHT n:" and <reason> tags from the reasoning texts; drop what is then empty."""
    clean = [
        p if isinstance(p, Frame) else re.sub(r"THOUGHT\s*\d+\s*:|</?reason>", "", p).strip()
        for p in pieces
    ]
    return [p for p in clean if p != ""]


def _split_answer(text, tag):
    """-> the text without its first <tag>...</tag>, and what that held; None if there is none."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
    if match is None:
        return text, None
    return text[: match.start()] + text[match.end() :], match.group(1).strip()


def _options(options, where):
    """The texts of A, B, C ...: a list, or an object by A, B, ... or 1, 2, ... 10.

    Letters of their own ("A. red", "(B) blue") are taken off if each text has its own.
    """
    if isinstance(options, dict):
        options = [options[k] for k in sorted(options, key=lambda k: (len(str(k)), str(k)))]
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        raise RecordError(f"{where}: options should be 2 to 26 texts, found {options!r:.60}")
    texts = [str(option) for option in options]
    lettered = [re.match(rf"\(?{chr(65 + i)}[).:]\s*(?=\S)", text) for i, text in enumerate(texts)]
    if all(lettered):
        texts = [text[letter.end() :] for text, letter in zip(texts, lettered)]
    return texts


def option_lines(options):
    """Options -> the text that shows them, "\\nA) red\\nB) blue"."""
    return "".join(f"\n{chr(65 + i)}) {option}" for i, option in enumerate(options))


def shows(text, options):
    """Whether a text holds each option behind its letter, as some FutureBench questions do."""
    lettered = [rf"\b{chr(65 + i)}\s*[).:]\s*{re.escape(o)}" for i, o in enumerate(options)]
    # a pattern costs much more than a look for its text
    return all(o in text for o in options) and all(re.search(line, text) for line in lettered)


def _with_options(question, options):
    return question if shows(question, options) else question + option_lines(options)


def answer_of(response):
    """The text of the first closed <answer>, or None. Source: paper sec. 4."""
    match = re.search(r"<answer>(.*?)</answer>", response, re.S)
    return match and match.group(1).strip()


def plain(text):
    """A text as answers are compared: lower case, single spaces, no outer punctuation."""
    return " ".join(text.lower().split()).strip(" .,:;!?\"'()")


def pick(answer, options):
    """An answer's text -> index of the option it means, or None. Source: ours.

    The option's text (any case, outer punctuation ignored), else its letter: "B", "(b)", "B) red".
    A letter counts only if nothing contradicts it: what follows is empty or that option's text.
    """
    if answer is None:
        return None
    texts = [plain(option) for option in options]
    if plain(answer) in texts:
        return texts.index(plain(answer))
    letter = re.match(r"\(?([A-Za-z])(?:[).:]|\s*$)", answer)
    index = ord(letter.group(1).upper()) - 65 if letter else -1
    if not 0 <= index < len(options):
        return None
    return index if plain(answer[letter.end() :]) in ("", texts[index]) else None


def no_option(row):
    """A row whose answer is none of its options -> a Skipped that says so; else None."""
    if row.options and pick(row.answer, row.options) is None:
        return Skipped(row.where, f"the answer {row.answer!r} is none of {row.options}")
    return None
