"""The command that draws what a model imagines, on a world of six clips."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common import painter
from common.formats import Frame, read_rows
from common.painter import Config as PainterConfig
from common.painter import Painter, look, teach
from model import LATENT, LATENT_END, LATENT_START
from tools import pictures


def test_the_command(world, tmp_path, capsys):
    """Breaks if nothing is drawn, an error is not told, or a missing painter is not named."""
    model, out = str(shutil.copytree(world["model"], tmp_path / "model")), tmp_path / "out"
    settings = dict(model=model, data=world["test"], out=str(out), max_new_tokens=20)
    settings.update(image_max_tokens=1, l_max=1, system="watch the ball")
    with pytest.raises(SystemExit, match="python -m common.painter teaches one"):
        pictures.main(pictures.Config(**settings))
    Painter(96).save(model)
    errors = pictures.main(pictures.Config(**settings))
    assert json.loads((out / "imagined.json").read_text()) == errors
    said = capsys.readouterr().out
    assert all(f"{value:.3f}  {name}" in said for name, value in errors.items())
    for name in ("imagined.png", "imagine.gif"):
        assert (out / name).stat().st_size > 1000


def test_errors_are_those_of_each_spans_own_frame(world):
    """Breaks if span m is compared with another frame: with true tokens for latents, errors are
    those of the painter, and beside another clip's frames they are larger.
    """
    model = pictures.Machine().load(world["model"])[0]
    rows = [row for row in read_rows(world["test"]) if row.group == "3-hop"]  # of two clips
    budget, answers, frames = (1024, 1024), [], []
    for row in rows:
        e = look(model, row.futures, budget).e
        answers.append(pictures.Answer(row, "", e.split([1, 1, 1]), True))
        frames += [part for part in (*row.prompt, *row.response) if isinstance(part, Frame)]
    painter = teach(look(model, frames, budget), PainterConfig(steps=150, batch=16))
    errors = pictures.errors_of(painter, answers, budget)
    strange = errors.pop("imagined, beside another clip's")
    assert len(rows) == 2 and set(errors) == {f"imagined {m}" for m in (1, 2, 3)}
    assert max(errors.values()) < 0.5 < strange


def test_words_between_spans():
    """Breaks if markup is shown, or a span's latents are taken for words."""
    span = f"{LATENT_START} {LATENT} {LATENT_END}"
    text = f"<reason> up </reason> {span} {span} <reason> hits red </reason> <answer> red </answer>"
    assert pictures.texts_of(text + "<|im_end|>") == ["up", "", "hits red"]


def test_an_answer_moves_word_by_word(tmp_path):
    """Breaks if a span's picture is there before its words, or what came is shown too early."""
    moving = [np.full((32, 32, 3), 40 * k, np.uint8) for k in range(1, 5)]
    strip = painter.Strip(moving[:2], moving[2:3], moving[3:4], "which ?", "red: right", True)
    pictures.animate(strip, ["goes up", "hits red"], str(tmp_path / "a.gif"))
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 1 + 2 + 4 + 2 + 1
    shown = {kind: [] for kind in painter.COLOURS}
    for n in range(gif.n_frames):
        gif.seek(n)
        shot = np.array(gif.convert("RGB")).astype(int)
        for kind, colour in painter.COLOURS.items():
            shown[kind].append(bool((np.abs(shot - colour).max(-1) < 12).sum() > 300))
    assert all(shown["seen"])
    assert shown["imagined"] == [False] * 3 + [True] * 7
    assert shown["came"] == [False] * 9 + [True]
