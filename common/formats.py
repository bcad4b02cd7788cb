"""Record formats: JSON, JSON lines, parquet -> Row."""

import dataclasses
import json
import math
import os
import re
from typing import NamedTuple


class RecordError(ValueError):
    """A record that cannot be used: the message names its file, its index and what was expected."""


class Frame(NamedTuple):
    """One image of a prompt or a future: key frame `index` (1..8) of a clip, or a whole image
    file (index 0).
    """

    source: str | bytes  # path, or the image file's bytes
    index: int = 0


class Clip(NamedTuple):
    """A clip that enters as a video: uniformly sampled frames with time stamps, of all of it or
    of a part.
    """

    path: str
    start: float = 0.0  # seconds
    end: float = math.inf


@dataclasses.dataclass
class Row:
    """The one normal form of all formats.

    `response` holds str (a reasoning step) and Frame (a future to imagine).
    """

    where: str  # "file:index", for every message
    id: str
    prompt: list  # str | Frame | Clip, in the order of the user turn
    response: list  # str | Frame; empty where the format has no reasoning
    answer: str
    question: str = ""
    options: list | None = None  # texts of A, B, C ...
    group: str = "all"  # what scores are split by


class Skipped(NamedTuple):
    """A sample that could not be used, and why."""

    where: str
    why: str


def read_rows(path, media_root=None):
    """A .json, .jsonl or .parquet file -> list of Row, whatever the format.

    Source: the published formats.

    media_root: where relative clip paths start; default: the folder of the file. Raises RecordError
    naming the file, the index and the missing key, FileNotFoundError if there is no file.
    """
    media_root = os.path.dirname(os.path.abspath(path)) if media_root is None else media_root
    rows = [
        read_record(record, f"{path}:{i}", media_root)
        for i, record in enumerate(read_records(path))
    ]
    if not rows:
        raise RecordError(f"{path}: no records")
    return rows


def read_records(path):
    """A .json, .jsonl or .parquet file -> its records as they stand.

    Raises RecordError, FileNotFoundError. Ours.
    """
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise RecordError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from e
        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8") as f:
        try:
            texts = f.read().split("\n") if path.endswith(".jsonl") else [f.read()]
        except UnicodeDecodeError as e:
            raise RecordError(f"{path}: not UTF-8 text ({e})") from e
    records = []
    for text in texts:
        try:
            records += [json.loads(text)] if text.strip() else []
        except json.JSONDecodeError as e:
            raise RecordError(f"{path}:{len(records)}: not JSON ({e})") from e
    if path.endswith(".jsonl"):
        return records
    records = records[0] if records else []
    if isinstance(records, dict):  # {"data": [...]} or {id: record}
        records = (
            records["data"] if isinstance(records.get("data"), list) else list(records.values())
        )
    if not isinstance(records, list):
        raise RecordError(f"{path}: expected a list of records, found {type(records).__name__}")
    return records


def read_record(record, where, media_root="."):
    """One JSON object -> Row. `where` names it in errors. Raises RecordError."""
    if not isinstance(record, dict):
        raise RecordError(f"{where}: expected an object, found {type(record).__name__}")

    def need(key, kind, of=record):
        if key not in of:
            raise RecordError(f"{where}: key {key!r} is missing (found {', '.join(sorted(of))})")
        if not isinstance(of[key], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise RecordError(
                f"{where}: {key!r} should be {names}, found {type(of[key]).__name__}: "
                f"{of[key]!r:.60}"
            )
        return of[key]

    def media(name):
        if not isinstance(name, str):
            raise RecordError(f"{where}: 'videos' should hold paths, found {name!r:.60}")
        return name if os.path.isabs(name) else os.path.join(media_root, name)

    def indices(key):
        found = need(key, list)
        if not all(type(i) is int and 1 <= i <= 8 for i in found):
            raise RecordError(f"{where}: {key!r} should hold key-frame numbers 1..8, found {found}")
        return found

    row = Row(
        where, str(record.get("id", where)), [], [], "", group=str(record.get("group", "all"))
    )
    if record.get("options") is not None:
        row.options = _options(record["options"], where)
    if "conversations" in record:  # future-l1
        clip = media(need("video", str))
        seen, future = (
            [Frame(clip, i) for i in indices(key)] if key in record else []
            for key in ("image", "reasoning_image")
        )
        turns = {"human": "", "gpt": ""}
        for turn in need("conversations", list):
            if (
                not isinstance(turn, dict)
                or turn.get("from") not in turns
                or not isinstance(turn.get("value"), str)
            ):
                raise RecordError(
                    f"{where}: a turn should be {{from: human|gpt, value: text}}, found "
                    f"{turn!r:.80}"
                )
            turns[turn["from"]] += turn["value"]
        chain, said = _split_answer(turns["gpt"], "answer")
        row.prompt = _interleave(turns["human"], "<image>", seen, where, "image")
        row.response = _steps(_interleave(chain, "<image>", future, where, "reasoning_image"))
        row.answer = (
            said
            if said is not None and "answer" not in record
            else need("answer", (str, int, float))
        )
    elif "question_images_index" in record:  # twiff, twiff-bench
        clip = media(need("video", str))
        seen, future = (
            [Frame(clip, i) for i in indices(key)]
            for key in ("question_images_index", "reasoning_images_index")
        )
        for key, frames in (("question_images", seen), ("reasoning_images", future)):
            if record.get(key):  # twiff-bench ships the pictures themselves
                frames[:] = [Frame(_image_source(x, where, key, media)) for x in need(key, list)]
        question, (chain, said) = need("question", str), _split_answer(need("answer", str), "ans")
        if "<image>" not in question:
            question = "<image>" * len(seen) + question
        row.prompt = _interleave(question, "<image>", seen, where, "question_images_index")
        if said is None:  # no chain: the answer alone
            if "<rimage>" in chain or "<ans>" in chain:
                raise RecordError(
                    f"{where}: 'answer' holds a chain without a closed <ans>...</ans>"
                )
            row.answer = chain
        else:
            row.answer = said
            row.response = _steps(
                _interleave(chain, "<rimage>", future, where, "reasoning_images_index")
            )
        meta = record.get("meta_data")
        if isinstance(meta, str) and meta.lstrip().startswith("{"):
            try:
                meta = json.loads(meta)
            except json.JSONDecodeError as e:
                raise RecordError(f"{where}: 'meta_data' is not JSON ({e})") from e
        if isinstance(meta, dict):
            row.group = str(
                next((meta[k] for k in ("class", "category", "type") if k in meta), "all")
            )
    elif "qa" in record:  # futurebench
        qa = need("qa", dict)
        row.options = _options(need("Options", (dict, list), qa), where)
        row.answer, row.group = need("Answer", str, qa), need("question_type", str)
        name = need("video_path", str).split("video_dataset/")[-1]
        row.prompt = [Clip(media(name)), _with_options(need("Question", str, qa), row.options)]
    elif "problem" in record:  # rl
        row.answer = need("answer", (str, int, float))
        images, videos = (
            need(key, list) if record.get(key) is not None else [] for key in ("images", "videos")
        )
        images = [Frame(_image_source(x, where, "images", media)) for x in images]
        text = need("problem", str).replace("<video>", "")
        text = "<image>" * len(images) + text if "<image>" not in text else text
        row.prompt = [Clip(media(x)) for x in videos]
        row.prompt += _interleave(text, "<image>", images, where, "images")
    elif "options" in record:  # mcq
        need("options", (list, dict))
        row.answer = need("answer", (str, int))
        row.prompt = [
            Clip(media(need("video", str))),
            _with_options(need("question", str), row.options),
        ]
    else:
        raise RecordError(
            f"{where}: unknown format (keys {', '.join(sorted(map(str, record)))}); expected one "
            "of the "
            "six in data.py: conversations | question_images_index | qa | problem | question + "
            "options"
        )
    row.answer = str(row.answer).strip()
    row.question = "".join(p for p in row.prompt if isinstance(p, str)).strip()
    for name in ("question", "answer"):
        if not getattr(row, name):
            raise RecordError(f"{where}: the {name} is empty")
    try:
        "".join(p for p in (*row.prompt, *row.response, row.answer) if isinstance(p, str)).encode()
    except UnicodeEncodeError as e:
        raise RecordError(f"{where}: the text is not valid Unicode ({e})") from e
    return row


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
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
    return (
        (text, None)
        if found is None
        else (text[: found.start()] + text[found.end() :], found.group(1).strip())
    )


def _options(options, where):
    if isinstance(options, dict):
        options = [
            options[k] for k in sorted(options, key=lambda k: (len(str(k)), str(k)))
        ]  # A, B, ... or 1, 2, ... 10
    if options is not None and (not isinstance(options, list) or not 2 <= len(options) <= 26):
        raise RecordError(f"{where}: options should be 2 to 26 texts, found {options!r:.60}")
    return options and [str(o) for o in options]


def _with_options(question, options):
    """Append "A) ..." lines unless the question already has them (some FutureBench questions
    do).
    """
    if all(
        re.search(rf"\b{chr(65 + i)}\s*[).:]\s*{re.escape(o)}", question)
        for i, o in enumerate(options)
    ):
        return question
    return question + "\n" + "\n".join(f"{chr(65 + i)}) {o}" for i, o in enumerate(options))


def _image_source(x, where, key, media):
    if isinstance(x, dict):  # the hub's image column: {"bytes": ..., "path": ...}
        x = x.get("bytes") or x.get("path")
    if not isinstance(x, (str, bytes)):
        raise RecordError(
            f"{where}: {key!r} should hold paths or image bytes, found {type(x).__name__}"
        )
    return media(x) if isinstance(x, str) else x


def answer_of(response):
    """The text of the first closed <answer>, or None. Source: paper sec. 4."""
    found = re.search(r"<answer>(.*?)</answer>", response, re.S)
    return found and found.group(1).strip()
