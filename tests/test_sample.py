"""One clip, one question, streamed: the text, the strip, the command line."""

import shutil

import pytest
import torch
from scripted import SPAN, png

import sample
from common.painter import Painter
from model import LATENT_END, LATENT_START


def test_stream(tokenizer, model):
    """Breaks if words are lost or doubled between pieces, or a span has no marker and length."""
    text = f"watch the {SPAN} ball which {LATENT_START} {LATENT_END} wall<|im_end|> hits"
    ids, out = tokenizer(text, add_special_tokens=False).input_ids, []
    stream = sample.Stream(tokenizer, model.config, out.append)
    for i in range(0, len(ids), 3):
        stream(torch.tensor([ids[i : i + 3]]))
    assert "".join(out) == "watch the\n[span 1: 2 latents]\nball which\n[span 2: 0 latents]\nwall"


@pytest.fixture
def run(world, film, tmp_path):
    """run(**settings) -> what sample.py writes about a clip, or about the picture given."""

    def run(**more):
        out, asked = [], dict(image_max_tokens=1, l_max=1, system="watch the ball")
        asked.update(model=world["model"], question="which wall ?", max_new_tokens=20)
        if "image" not in more:
            asked.update(video=film(), key_frames="3,4")
        asked.update(strip=str(tmp_path / "strip"))
        sample.main(sample.Config(**{**asked, **more}), out.append)
        return "".join(out)

    return run


def test_an_answer_and_its_strip(run, world, tmp_path):
    """Breaks if the command does not end with an answer or why there is none, a strip that cannot
    be painted is not explained, or a strip without an extension is not a PNG.
    """
    strip = tmp_path / "strip.png"
    *_, answer, said = run().splitlines()
    assert answer.startswith(("answer: ", "no answer: the response ended by "))
    assert "has no painter (python -m common.painter)" in said and not strip.exists()

    painted = shutil.copytree(world["model"], tmp_path / "painted")
    Painter(96).save(str(painted))
    assert str(strip) in run(model=str(painted)).splitlines()[-1]
    assert strip.read_bytes().startswith(b"\x89PNG")

    # a still picture in place of a clip
    (tmp_path / "photo.png").write_bytes(png(0))
    text = run(image=str(tmp_path / "photo.png"), model=str(painted), strip=str(tmp_path / "s.png"))
    assert text.startswith("which wall ?") and "s.png: what was seen" in text


def test_what_cannot_be_asked(run, tmp_path):
    """Breaks if a bad clip, picture or flag gives anything but a message."""
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for change, message in (
        (dict(video="gone.mp4"), "--video: gone.mp4: no such file"),
        (dict(image="gone.png"), "--image: gone.png: cannot be read"),
        (dict(image="a.png", video="b.mp4"), "--image goes without --video"),
        (dict(video=""), "--video is missing"),
        (dict(question=""), "--question is missing"),
        (dict(video=str(tmp_path / "text.mp4")), "text.mp4: cannot be read as a video"),
        (dict(video=str(tmp_path / "empty.mp4")), "empty.mp4: cannot be read as a video"),
        (dict(key_frames="0,9"), "numbers from 1 to 8"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(**change)
