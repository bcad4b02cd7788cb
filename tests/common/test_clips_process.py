"""common/clips.py: the process that decodes may die, and that costs a clip, not the run."""

import dataclasses
import json
import os
import shutil
import threading

import numpy as np
import pytest
import test_la_dapo
from test_sft import settings

import curate
import evaluate
import la_dapo
import sft
from common import clips
from common.clips import ClipError, Decoder, DecoderError, key_frame_positions, read_clip
from common.formats import Clip
from tests.conftest import TINY_DATA, shown

# decord that ends its process on a file that says so, and leaves all others to PyAV
ABORTS = """
import os

class VideoReader:
    def __init__(self, path, num_threads):
        with open(path, "rb") as f:
            if f.read(5) == b"ABORT":
                os.abort()
        raise RuntimeError("a stand-in")
"""
SAID = "decord: it ended the reading process (SIGABRT)"


@pytest.fixture
def fatal(world, stand_in_decord, tmp_path):
    """A copy of the world's test rows; the clip of the first four ends what reads it."""
    stand_in_decord(ABORTS)
    source = os.path.dirname(world["test"])
    shutil.copytree(os.path.join(source, "clips"), tmp_path / "data" / "clips")
    (tmp_path / "data" / "clips" / "fatal.mp4").write_bytes(b"ABORT")
    with open(world["test"]) as f:
        records = [json.loads(line) for line in f]
    for record in records[:4]:
        record["video"] = "clips/fatal.mp4"
    path = tmp_path / "data" / "fatal.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def log_of(out):
    return read_lines(os.path.join(out, "log.jsonl"))


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize("workers", [0, 1])
def test_sft_goes_on(workers, world, fatal, tmp_path):
    """Breaks if a reader that dies ends the training, at first or when it is resumed, or a sample
    is lost without its name.
    """
    out = str(tmp_path / "out")
    options = dict(data=fatal, steps=4, global_batch=4, save_every=2, workers=workers)
    config = settings(world, out, **options)
    sft.train(config)
    shutil.rmtree(os.path.join(out, "step_000004"))
    lines = log_of(out)
    sft.train(dataclasses.replace(config, resume=True))
    again = log_of(out)
    for a, b in zip(lines, again, strict=True):
        assert dict(a, seconds=0) == dict(b, seconds=0)
    skipped = [skip for line in lines for skip in line["skipped"]]
    assert len(skipped) == 8  # of 16 samples, two passes over the rows
    assert all(where.startswith(fatal) and SAID in why for where, why in skipped)


@pytest.mark.slow  # whole trainings
def test_la_dapo_goes_on(world, fatal, tmp_path):
    """As test_sft_goes_on."""
    options = dict(data=fatal, steps=2, groups=8, save_every=1, workers=1)
    config = test_la_dapo.settings(world, world["model"], tmp_path / "out", **options)
    la_dapo.train(config)
    shutil.rmtree(tmp_path / "out" / "step_000002")
    la_dapo.train(dataclasses.replace(config, resume=True))
    names = [skip for line in log_of(tmp_path / "out") for skip in line["skipped_names"]]
    assert len(names) >= 4 and all(SAID in why for _, why in names)


@pytest.mark.slow  # whole runs
def test_curate_and_evaluate_go_on(world, fatal, tmp_path):
    """As test_sft_goes_on; each line says what became of its row."""
    shared = dict(model=world["model"], data=fatal, max_new_tokens=6)
    shared.update(TINY_DATA, max_bad=0.6, workers=1)
    for _ in range(2):  # the second run tries again what could not be read
        evaluate.evaluate(evaluate.Config(**shared, out=str(tmp_path / "e"), batch=3))
        curate.probe(curate.Config(**shared, out=str(tmp_path / "c"), rollouts=2))
        for path in ("e/samples.jsonl", "c/probe.jsonl"):
            lines = read_lines(tmp_path / path)
            assert [SAID in line.get("skipped", "") for line in lines].count(True) == 4
            assert len(lines) == 8


def test_the_next_clip_is_read(film, stand_in_decord, tmp_path):
    """Breaks if a process that died is asked again, or its end is not said."""
    stand_in_decord(ABORTS)
    (tmp_path / "fatal.mp4").write_bytes(b"ABORT")
    for _ in range(2):
        with pytest.raises(ClipError, match="fatal.mp4: cannot be read.*SIGABRT.*PyAV: Invalid"):
            read_clip(str(tmp_path / "fatal.mp4"), key_frame_positions)
        assert shown(read_clip(film(), key_frame_positions)[0]) == [1, 4, 10, 16, 22, 28, 34, 38]


def test_a_reader_that_hangs(film, stand_in_decord, monkeypatch):
    """Breaks if a decoder that never comes back stops the run."""
    stand_in_decord("import time; time.sleep(60)")
    path = film()
    monkeypatch.setattr(clips, "PATIENCE", 0.5)
    with pytest.raises(DecoderError, match="decord: no answer in 0 s"):
        Decoder().read("decord", path, lambda total, fps: [0])
    monkeypatch.undo()


def test_a_fault_of_the_caller_is_its_own(film):
    """Breaks if an error between question and answer leaves the process half way."""
    own = Decoder()
    with pytest.raises(ZeroDivisionError):
        own.read("PyAV", film(), lambda total, fps: 1 / 0)
    assert len(own.read("PyAV", film(), lambda clock, fps: [0, len(clock) - 1])[0]) == 2
    own.end()
    own.end()


def test_threads_take_turns(film):
    """Breaks if two threads talk to the process at once."""
    paths, results = [film(f"{k}.mp4", range(k, k + 9)) for k in range(4)], {}

    def read(path):
        results[path] = read_clip(path, key_frame_positions)[0]

    threads = [threading.Thread(target=read, args=(path,)) for path in paths for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, path in enumerate(paths):
        assert shown(results[path]) == [k + i for i in key_frame_positions(9)]


def test_pyav_decodes_a_clip_once(film, monkeypatch):
    """Breaks if a long clip is decoded twice, or a count that is wrong is believed."""
    decode, passes = clips._decode, []

    def counted(path, wanted):
        passes.append(path)
        return decode(path, wanted)

    monkeypatch.setattr(clips, "_decode", counted)
    pictures, numbers, seconds, fps = clips.pyav(film(), lambda clock, fps: [0, len(clock) - 1])
    assert shown(pictures) == [0, 39] and numbers == [0, 39] and fps == 12 and len(passes) == 1
    monkeypatch.setattr(clips, "_is_shown", lambda packet: packet.size > 0 and packet.pts % 2)
    pictures, numbers, _, _ = clips.pyav(film(), lambda clock, fps: [0, len(clock) - 1])
    assert shown(pictures) == [0, 39] and len(passes) == 3


def test_a_part_of_a_clip_is_opened_once(film, monkeypatch):
    """Breaks if the frame rate, which decides where a part lies, costs another look at the clip."""
    asked, read = [], Decoder.read

    def counted(self, name, path, choose):
        asked.append(name)
        return read(self, name, path, choose)

    monkeypatch.setattr(Decoder, "read", counted)
    frames, numbers, seconds = clips.read_uniform(Clip(film(), 1.0, 2.0), 3)
    assert numbers == [12, 18, 24] and shown(frames) == numbers and asked == ["decord"]
    assert isinstance(frames, np.ndarray) and seconds.tolist() == [1.0, 1.5, 2.0]
