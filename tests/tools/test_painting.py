"""The command that teaches a painter and draws what is imagined, on a world of six clips."""

import json
import os
import shutil

import pytest
import torch

from common.formats import Frame, read_rows
from common.pictures import Painter
from model import LATENT, LATENT_END, LATENT_START
from tests.conftest import TINY_DATA
from tools import pictures


def settings(world, tmp_path, **more):
    model = str(tmp_path / "model")
    if not os.path.exists(model):
        shutil.copytree(world["model"], model)
    sizes = dict(TINY_DATA, steps=3, frames=20, max_new_tokens=20, out=str(tmp_path / "out"))
    return pictures.Config(**{**sizes, **more}, model=model, data=world["data"])


def test_the_command(world, tmp_path, capsys):
    """Breaks if nothing is saved or drawn, an error is not told, or a painter is taught twice."""
    errors = pictures.main(settings(world, tmp_path, show=world["test"]))
    assert 0 < errors["true frames, held out"] < 10
    assert json.loads((tmp_path / "out" / "imagined.json").read_text()) == errors
    assert "true frames, held out" in capsys.readouterr().out
    for name in ("imagined.png", "imagine.gif"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    stamp = (tmp_path / "model" / "painter" / "painter.safetensors").stat().st_mtime_ns
    assert pictures.main(settings(world, tmp_path, frames=30)) == {}
    assert (tmp_path / "model" / "painter" / "painter.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit, match="--data is missing"):
        pictures.main(pictures.Config(model=world["model"]))


def test_held_out_clips_are_not_learnt_from(world, tmp_path, monkeypatch):
    """Breaks if a clip of the held-out frames is among those that the painter sees."""
    looked = []
    look = pictures.look
    monkeypatch.setattr(pictures, "look", lambda m, f, b: looked.append(f) or look(m, f, b))
    pictures.main(settings(world, tmp_path))
    learnt, held_out = ({frame.source for frame in some} for some in looked)
    assert learnt and held_out and not learnt & held_out


def test_a_frame_that_cannot_be_read_is_left_out(model, clip, capsys):
    """Breaks if one bad clip ends the run, or goes unnamed."""
    frames = [Frame("gone.mp4", 1), Frame(clip(), 1)]
    assert len(pictures.look(model, frames, (1024, 1024)).e) == 1
    assert "gone.mp4: no such file" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit, match="no frame can be read"):
        pictures.look(model, frames[:1], (1024, 1024))


def test_errors_are_those_of_each_spans_own_frame(world, monkeypatch):
    """Breaks if span m is held against another frame: with true tokens for latents, errors are
    those of the painter, and beside another clip's frames they are larger.
    """
    model = pictures.Machine().load(world["model"])[0]
    rows = pictures.longest(read_rows(world["test"]), 9)
    assert [row.group for row in rows] == ["3-hop"] * 2  # of two clips
    budget, answers = (1024, 1024), []
    for row in rows:
        futures = [part for part in row.response if isinstance(part, Frame)]
        e = pictures.look(model, futures, budget).e
        answers.append(pictures.Answer(row, "", [], e, [1, 1, 1], True))
    frames = pictures.frames_of(rows, 99)
    every = pictures.look(model, frames, budget)
    painter = pictures.teach(every, pictures.Config(steps=150, batch=16))
    errors = pictures.errors_of(painter, answers, budget)
    assert set(errors) == {f"imagined {m}" for m in (1, 2, 3)} | {"imagined, beside another clip's"}
    strange = errors.pop("imagined, beside another clip's")
    assert max(errors.values()) < 0.5 < strange


def test_words_between_spans():
    """Breaks if markup is shown, or a span's latents are taken for words."""
    span = f"{LATENT_START} {LATENT} {LATENT_END}"
    text = f"<reason> up </reason> {span} {span} <reason> hits red </reason> <answer> red </answer>"
    assert pictures.texts_of(text + "<|im_end|>") == ["up", "", "hits red"]


def test_a_painter_of_its_own_width_comes_back(tmp_path):
    """Breaks if the saved folder does not tell the painter's shape."""
    Painter(24, width=32).save(str(tmp_path))
    again = Painter.beside(str(tmp_path))
    assert again(torch.zeros(2, 24)).shape == (2, 3, 32, 32)
