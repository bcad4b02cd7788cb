"""The benchmarks: how their public files become rows.

    rows, average = read_benchmark("mcq", "videomme/test.parquet", "videomme/videos")

Multiple choice has one normal form, {id, video, question, options, answer, group}, with start and
end or a picture where a release has them. `RELEASES` maps the fields of each release to it. Records
in the normal form, or with options in any format of docs/data.md, need no entry.
"""

import os
import re
from collections import Counter
from typing import NamedTuple

from common.formats import (
    ASK_LETTER,
    Frame,
    RecordError,
    Skipped,
    name_unknown_keys,
    read_record,
    read_records,
)

BENCHMARKS = ("", "futurebench", "twiffbench", "mcq")
HOPS = {"hop1": "1-hop", "hop2": "2-hop", "hop3": "3-hop", "hop5": "interp"}  # FutureBench's splits
CLIPS = "first_part_video"  # FutureBench: the clips, cut before what is asked about
WHOLE = "video_dataset"  # the whole videos, in which the answer is seen
FILES = (".json", ".jsonl", ".parquet")


class Release(NamedTuple):
    """The fields of a release.

    Names in braces are its fields; {stem} is the file's name, {n} the record's number, {folder} the
    folder in MVBENCH.
    """

    keys: str  # a record of this release has all of these
    id: str
    video: str  # below the media root
    options: str  # the field that lists them, or one field each
    group: str
    average: str = "micro"
    index: bool = False  # the answer is a number from 0 on; else a letter or an option's text
    answer: str = "answer"
    picture: str = ""  # a picture shown after the clip, below the media root


RELEASES = {  # the first that fits is taken
    "Video-MME": Release(
        "videoID question_id options", "{question_id}", "{videoID}.mp4", "options", "{duration}"
    ),
    "EgoSchema": Release(
        "video_idx option", "{question_idx}", "{video_idx}.mp4", "option", "all", index=True
    ),
    "NExT-QA": Release(
        "qid a0 a4", "{video}-{qid}", "{video}.mp4", "a0 a1 a2 a3 a4", "{type}", index=True
    ),
    "SEED-Bench-R1": Release(
        "video_basename current_observation_basename golden_choice_idx",
        "{sample_id}",
        "videos/{video_source}/{video_basename}",
        "choice_a choice_b choice_c choice_d",
        "{task_level}",
        answer="golden_choice_idx",
        picture="images/{video_source}/{current_observation_basename}",
    ),
    "MLVU_dev": Release(  # sy1998/MLVU_dev on the hub
        "video_name task_type", "{stem}-{n}", "{video_name}", "candidates", "{task_type}", "macro"
    ),
    "MLVU": Release(
        "candidates question_type",
        "{stem}-{n}",
        "{stem}/{video}",
        "candidates",
        "{question_type}",
        "macro",
    ),
    "MVBench": Release("candidates", "{stem}-{n}", "{folder}/{video}", "candidates", "{stem}"),
}

# MVBench: the folder of a task's clips in the release; its name in the hub's `video` revision,
# where clips are mp4 files and already cut ("" = the same as in the release); the tasks, by which
# the files of questions are named
MVBENCH = (
    (
        "star/Charades_v1_480",
        "star/Charades_segment",
        "action_sequence action_prediction object_interaction",
    ),
    ("ssv2_video", "ssv2_video_mp4", "action_antonym"),
    ("Moments_in_Time_Raw/videos", "", "fine_grained_action"),
    ("FunQA_test/test", "", "unexpected_action"),
    ("sta/sta_video", "sta/sta_video_segment", "action_localization"),
    ("scene_qa/video", "", "scene_transition"),
    ("perception/videos", "", "object_shuffle action_count state_change character_order"),
    (
        "clevrer/video_validation",
        "",
        "object_existence moving_direction moving_count moving_attribute counterfactual_inference",
    ),
    ("nturgbd", "nturgbd_convert", "fine_grained_pose"),
    ("vlnqa", "", "egocentric_navigation"),
    # in the release folders of pictures, which are read as missing clips
    ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment", "episodic_reasoning"),
)


def release_of(record):
    """The release that a record belongs to, or None."""
    keys = set(record) if isinstance(record, dict) else set()
    return next((r for r in RELEASES.values() if set(r.keys.split()) <= keys), None)


def normal_form(record, where, stem="", n=0):
    """A record of one of RELEASES -> (its normal form, its Release), else (record, None).

    Source: the public releases' fields. Raises RecordError naming a missing field, and for
    MVBench's fields in a file that is none of its tasks.
    """
    release = release_of(record)
    if release is None:
        return record, None
    folder = next((folder for folder, _, tasks in MVBENCH if stem in tasks.split()), None)
    if release is RELEASES["MVBench"] and folder is None:
        raise RecordError(
            f"{where}: {stem!r} is none of MVBench's 20 tasks; another release that has "
            "'candidates' needs the normal form (id, video, question, options, answer, group)"
        )
    fields = dict(record, stem=stem, n=n, folder=folder)
    out = {name: record[name] for name in ("start", "end") if name in record}
    try:
        for name in ("id", "video", "group", "picture"):
            out[name] = getattr(release, name).format(**fields)
        out["question"], out["answer"] = record["question"], record[release.answer]
        out["options"] = options_of(record, release)
    except KeyError as e:
        raise RecordError(f"{where}: key {e} is missing (found {', '.join(sorted(record))})") from e
    if release.index:  # an answer's number becomes a letter
        last, answer = len(out["options"]) - 1, str(out["answer"])
        if not re.fullmatch(r"\d+", answer) or int(answer) > last:
            raise RecordError(
                f"{where}: 'answer' should be 0..{last}, found {out['answer']!r} "
                "(EgoSchema has answers in its subset only)"
            )
        out["answer"] = chr(65 + int(answer))
    return out, release


def options_of(record, release):
    """The texts of a record's options. Raises KeyError.

    In MLVU_dev without candidates they are the lines of the question that begin with (A), (B), ...
    """
    if release is RELEASES["MLVU_dev"] and not record.get(release.options):
        return re.findall(r"^\s*(\(?[A-H][).:]\s*\S.*?)\s*$", record["question"], re.M)
    fields = release.options.split()
    return record[fields[0]] if len(fields) == 1 else [record[field] for field in fields]


def take_cut_clip(record, root):
    """MVBench's normal form -> the same with the clip of the `video` revision, if `root` has it.

    That clip is already cut at `start` and `end`, so they are dropped. Source: the revision's
    folders.
    """
    for folder, cut, _ in MVBENCH:
        clip = record["video"].replace(folder + "/", cut + "/", 1)
        if cut and clip != record["video"] and os.path.exists(os.path.join(root, clip)):
            return dict(record, video=clip, start=None, end=None)
    return record


def files_of(data):
    """A path or a hub id -> [(name, records)].

    The path is a file or a folder of files; MLVU's files 8_ and 9_ have no options and are left
    out. A hub id, `org/name` or `org/name:config`, means the test split of that dataset, which
    `datasets` loads. Raises FileNotFoundError if it is none of these, RecordError if it cannot be
    read.
    """
    if os.path.isdir(data):
        names = sorted(name for name in os.listdir(data) if name.endswith(FILES))
        if not names:
            raise FileNotFoundError(f"{data}: no .json, .jsonl or .parquet file in this folder")
        open_ended = [name for name in names if re.match(r"[89]_(sub_scene|summary)", name)]
        for name in open_ended:
            print(f"{name}: MLVU's generation tasks have no options, left out")
        paths = [os.path.join(data, name) for name in names if name not in open_ended]
        return [(path, read_records(path)) for path in paths]
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) and not data.endswith(FILES)
    if os.path.exists(data) or not is_hub_id:
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
    """The folder of the clips of a benchmark's file: media_root, else the folder of the file.

    For FutureBench the default is `first_part_video` in that folder. Raises ValueError for the
    folder of its whole videos.
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
    """Read a benchmark -> (rows, how groups are averaged: micro | macro). Source: RELEASES.

    name: one of BENCHMARKS. data: a file, a folder of files, or a hub id. media_root: where
    relative clip paths start, default as in `clips_folder`. bad: a list that gets a Skipped for
    each record that cannot be used; None = the first one raises RecordError. A repeated id gets a
    number. Raises ValueError for an unknown name, RecordError if no record can be used, and the
    errors of `files_of` and `clips_folder`.
    """
    if name not in BENCHMARKS:
        known = ", ".join(b for b in BENCHMARKS if b)
        raise ValueError(f"benchmark is {name!r}, expected one of {known}")
    rows, averages, seen, why = [], set(), Counter(), ""
    for path, records in files_of(data) if name else [(data, read_records(data))]:
        root = clips_folder(name, path, media_root)
        name_unknown_keys(path, [record for record in records if release_of(record) is None])
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
    where, release, normal = f"{path}:{n}", None, record
    stem = os.path.splitext(os.path.basename(path))[0].split(":")[-1]
    if name == "mcq" and isinstance(record, dict):
        normal, release = normal_form(record, where, stem, n)
    if release is RELEASES["MVBench"]:
        normal = take_cut_clip(normal, root)
    row = read_record(normal, where, root)

    # SEED-Bench-R1 shows a picture after the clip, or instead of it if nothing was done yet
    if release and normal["picture"]:
        row.prompt.insert(1, Frame(os.path.join(root, normal["picture"])))
        row.prompt = row.prompt if record.get("task_progress_metadata") else row.prompt[1:]

    # a record without an id gets a short one that does not depend on the file's folder
    if name and row.id == where:
        row.id = f"{os.path.basename(path)}:{n}"
    if name == "futurebench":
        row.group = HOPS.get(row.group, row.group)
        row.prompt.append(ASK_LETTER)
    return row, release.average if release else "micro"
