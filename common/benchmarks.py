"""The benchmarks: how their public files become rows, and what the paper published on them.

    rows, average = read_benchmark("mcq", "videomme/test.parquet", "videomme/videos")

Multiple choice has one normal form, {id, video, question, options, answer, group}; `READERS` says
for each release which of its fields goes where. Rows of the normal form, and of every format of
data.py with options, need no reader.
"""

import glob
import os
import re
from collections import Counter
from typing import NamedTuple

from common.formats import ASK_LETTER, Clip, Frame, RecordError, Skipped, read_record, read_records

BENCHMARKS = ("", "futurebench", "twiffbench", "mcq")


# FutureBench's four splits
HOPS = {"hop1": "1-hop", "hop2": "2-hop", "hop3": "3-hop", "hop5": "interp"}


CLIPS = "first_part_video"  # FutureBench: the clips, cut before what is asked about
WHOLE = "video_dataset"  # the whole videos, in which the answer is seen

# Published by the paper (Qwen3-VL-8B), never run here: {benchmark: (columns, {row: values})}
PAPER = {
    "futurebench": (
        ("1-hop", "2-hop", "3-hop", "interp", "all", "tokens", "seconds"),
        {
            "Qwen3-VL-8B": (64.2, 65.8, 66.2, 55.8, 61.0, 288.8, 1.18),
            "text-only SFT": (67.6, 66.8, 68.2, 62.0, 65.0),
            "Future-L1-SFT": (70.5, 73.1, 77.6, 72.2, 73.2, 205.3, 0.96),
            "Future-L1-RL": (83.2, 86.5, 86.6, 85.1, 85.4, 195.3, 0.91),
        },
    ),
    "twiffbench": (
        ("chain", "answer", "average"),
        {
            "Qwen3-VL-8B": (2.75, 2.14, 2.44),
            "Future-L1-SFT": (2.62, 2.42, 2.52),
            "Future-L1-RL": (3.11, 2.97, 3.04),
        },
    ),
}


class Reader(NamedTuple):
    """Where a release keeps what.

    Texts in braces are its fields; {stem} is the file's name, {n} the record's number.
    """

    keys: tuple  # a record of this release has all of these
    id: str
    video: str  # below the media root
    options: str | tuple  # the field that lists them, or one field each
    group: str
    average: str = "micro"
    index: bool = False  # the answer is a number from 0 on; else a letter or an option's text
    answer: str = "answer"
    picture: str = ""  # a picture shown after the clip, below the media root


READERS = {  # the first that fits is taken
    "Video-MME": Reader(
        ("videoID", "question_id", "options"),
        "{question_id}",
        "{videoID}.mp4",
        "options",
        "{duration}",
    ),
    "EgoSchema": Reader(
        ("video_idx", "option"), "{question_idx}", "{video_idx}.mp4", "option", "all", index=True
    ),
    "NExT-QA": Reader(
        ("qid", "a0", "a4"),
        "{video}-{qid}",
        "{video}.mp4",
        ("a0", "a1", "a2", "a3", "a4"),
        "{type}",
        index=True,
    ),
    "SEED-Bench-R1": Reader(
        ("video_basename", "current_observation_basename", "golden_choice_idx"),
        "{sample_id}",
        "videos/{video_source}/{video_basename}",
        ("choice_a", "choice_b", "choice_c", "choice_d"),
        "{task_level}",
        answer="golden_choice_idx",
        picture="images/{video_source}/{current_observation_basename}",
    ),
    "MLVU_dev": Reader(  # sy1998/MLVU_dev on the hub
        ("video_name", "task_type"),
        "{stem}-{n}",
        "{video_name}",
        "candidates",
        "{task_type}",
        "macro",
    ),
    "MLVU": Reader(
        ("candidates", "question_type"),
        "{stem}-{n}",
        "{stem}/{video}",
        "candidates",
        "{question_type}",
        "macro",
    ),
    "MVBench": Reader(("candidates",), "{stem}-{n}", "{folder}/{video}", "candidates", "{stem}"),
}


MVBENCH_FOLDERS = {  # where MVBench's release keeps the clips of a task (the file's name)
    folder: tasks.split()
    for folder, tasks in {
        "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
        "ssv2_video": "action_antonym",
        "Moments_in_Time_Raw/videos": "fine_grained_action",
        "FunQA_test/test": "unexpected_action",
        "sta/sta_video": "action_localization",
        "scene_qa/video": "scene_transition",
        "perception/videos": "object_shuffle action_count state_change character_order",
        "clevrer/video_validation": "object_existence moving_direction moving_count "
        "moving_attribute counterfactual_inference",
        "nturgbd": "fine_grained_pose",
        "vlnqa": "egocentric_navigation",
        "tvqa/frames_fps3_hq": "episodic_reasoning",
    }.items()
}  # the last: folders of pictures, read as missing clips


# The hub's `video` revision of MVBench keeps five of these folders elsewhere: every clip is an mp4,
# and already cut.
MVBENCH_CUT = {
    "star/Charades_v1_480": "star/Charades_segment",
    "ssv2_video": "ssv2_video_mp4",
    "sta/sta_video": "sta/sta_video_segment",
    "nturgbd": "nturgbd_convert",
    "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment",
}


def normal_form(record, where, stem="", n=0):
    """A record of one of READERS' releases -> (its normal form, its Reader), else (record, None).

    The normal form: {id, video, question, options, answer, group}, with MVBench's {start, end} and
    SEED-Bench-R1's {picture}. Source: the public releases' fields. Raises RecordError naming a
    missing field, and for MVBench's fields in a file that is none of its tasks.
    """
    reader = next((r for r in READERS.values() if set(r.keys) <= set(record)), None)
    if reader is None:
        return record, None
    folder = next((f for f, tasks in MVBENCH_FOLDERS.items() if stem in tasks), None)
    if reader is READERS["MVBench"] and folder is None:
        raise RecordError(
            f"{where}: {stem!r} is none of MVBench's 20 tasks; another release that has "
            "'candidates' needs the normal form (id, video, question, options, answer, group)"
        )

    # fields that go where the reader says
    fields = dict(record, stem=stem, n=n, folder=folder)
    try:
        out = {name: getattr(reader, name).format(**fields) for name in ("id", "video", "group")}
        out |= dict(question=record["question"], answer=record[reader.answer])
        out["options"] = options_of(record, reader)
        if reader.picture:
            out["picture"] = reader.picture.format(**fields)
    except KeyError as e:
        raise RecordError(f"{where}: key {e} is missing (found {', '.join(sorted(record))})") from e

    # an answer's number becomes a letter
    if reader.index:
        last, answer = len(out["options"]) - 1, str(out["answer"])
        if not re.fullmatch(r"\d+", answer) or int(answer) > last:
            raise RecordError(
                f"{where}: 'answer' should be 0..{last}, found {out['answer']!r} "
                "(EgoSchema has answers in its subset only)"
            )
        out["answer"] = chr(65 + int(answer))
    return out | {k: record[k] for k in ("start", "end") if k in record}, reader


def take_cut_clip(record, root):
    """MVBench's normal form -> the same with the clip of the `video` revision, if `root` has it.

    `start` and `end` say where that clip was cut, so they go. Source: the revision's folders.
    """
    for folder, cut in MVBENCH_CUT.items():
        clip = record["video"].replace(folder + "/", cut + "/", 1)
        if record["video"].startswith(folder + "/") and os.path.exists(os.path.join(root, clip)):
            kept = {k: v for k, v in record.items() if k not in ("start", "end")}
            return dict(kept, video=clip)
    return record


def options_of(record, reader):
    """The texts of a record's options. Raises KeyError.

    MLVU_dev without candidates: the lines of the question that begin with (A), (B), ...
    """
    if not isinstance(reader.options, str):
        options = [record[key] for key in reader.options]
    elif reader is READERS["MLVU_dev"] and not record.get(reader.options):
        options = re.findall(r"^\s*(\(?[A-H][).:]\s*\S.*?)\s*$", record["question"], re.M)
    else:
        options = record[reader.options]
    return options


def files_of(data):
    """A path or a hub id -> [(name, records)]. Source: ours.

    A file, each file of a folder (of MLVU's the first seven: 8_ and 9_ have no options), or a hub
    dataset's test split, `org/name` or `org/name:config` (by `datasets`). Raises FileNotFoundError
    for what is none of them, RecordError for what cannot be read.
    """
    if os.path.isdir(data):
        paths = sorted(
            p
            for ext in ("json", "jsonl", "parquet")
            for p in glob.glob(f"{glob.escape(data)}/*.{ext}")
        )
        if not paths:
            raise FileNotFoundError(f"{data}: no .json, .jsonl or .parquet file in this folder")
        open_ended = [
            p for p in paths if re.match(r"[89]_(sub_scene|summary)", os.path.basename(p))
        ]
        for path in open_ended:
            print(f"{path}: MLVU's generation tasks have no options, left out")
        return [(path, read_records(path)) for path in paths if path not in open_ended]
    if (
        os.path.exists(data)
        or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data)
        or data.endswith((".json", ".jsonl", ".parquet"))
    ):
        return [(data, read_records(data))]
    try:
        import datasets
    except ImportError as e:
        raise RecordError(
            f"{data}: no such file, and reading it from the hub needs datasets "
            "(pip install datasets)"
        ) from e
    splits = datasets.load_dataset(*data.split(":"))
    split = "test" if "test" in splits else next(iter(splits))
    # the stored form: pictures as bytes, not decoded
    return [(data, splits[split].data.to_pylist())]


def clips_folder(name, path, media_root):
    """Where the clips of a benchmark's file lie: media_root, else the folder of the file. Ours.

    FutureBench: else `first_part_video` beside the file. Raises ValueError for the whole videos.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if name != "futurebench":
        return folder if media_root is None else media_root
    root = os.path.join(folder, CLIPS) if media_root is None else media_root
    if os.path.basename(os.path.abspath(root)) == WHOLE:
        raise ValueError(
            f"media root {root}: {WHOLE} holds the whole videos, in which the model would see the "
            f"answer; FutureBench is asked on the cut clips in {CLIPS}"
        )
    return root


def read_benchmark(name, data, media_root=None, bad=None):
    """-> (rows, how groups are averaged: micro | macro). Source: DESIGN.md section 5, READERS.

    name: one of BENCHMARKS. data: a file, a folder of files, or a hub id. media_root: where
    relative clip paths start, default as in `clips_folder`. bad: a list that gets a Skipped for
    each record that cannot be used; None = the first one raises RecordError. An id that comes again
    gets a number. Raises ValueError for an unknown name, RecordError if no record can be used, and
    as `files_of` and `clips_folder` do.
    """
    if name not in BENCHMARKS:
        known = ", ".join(b for b in BENCHMARKS if b)
        raise ValueError(f"benchmark is {name!r}, expected one of {known}")
    rows, averages, seen, why = [], set(), Counter(), ""
    for path, records in files_of(data) if name else [(data, read_records(data))]:
        root = clips_folder(name, path, media_root)
        for n, record in enumerate(records):
            try:
                row, average = read_row(name, record, path, n, root)
            except RecordError as e:
                if bad is None:
                    raise
                bad.append(Skipped(f"{path}:{n}", str(e)))
                why = f"; the last: {e}"
                continue
            seen[row.id] += 1
            row.id += f"#{seen[row.id]}" if seen[row.id] > 1 else ""
            rows.append(row)
            averages.add(average)
    if not rows:
        raise RecordError(f"{data}: no records{why}")
    return rows, averages.pop() if len(averages) == 1 else "micro"


def read_row(name, record, path, n, root):
    """Record n of a benchmark's file -> (Row, micro | macro). Raises RecordError."""
    where, reader, source = f"{path}:{n}", None, record
    stem = os.path.splitext(os.path.basename(path))[0].split(":")[-1]
    if name == "mcq" and isinstance(record, dict):
        record, reader = normal_form(record, where, stem, n)
    if reader is READERS["MVBench"]:
        record = take_cut_clip(record, root)
    row = read_record(record, where, root)

    # MVBench asks about a part of the clip, in seconds; SEED-Bench-R1 shows a picture after the
    # clip, or instead of it where nothing has been done yet
    if reader and record.get("end"):
        start, end = float(record.get("start") or 0), float(record["end"])
        row.prompt[0] = Clip(row.prompt[0].path, start, end)
    if reader and record.get("picture"):
        row.prompt.insert(1, Frame(os.path.join(root, record["picture"])))
        row.prompt = row.prompt if source.get("task_progress_metadata") else row.prompt[1:]

    # a file that names no id: short, and the same wherever the file lies
    if name and row.id == where:
        row.id = f"{os.path.basename(path)}:{n}"
    if name == "futurebench":
        row.group = HOPS.get(row.group, row.group)
        row.prompt.append(ASK_LETTER)
    return row, reader.average if reader else "micro"
