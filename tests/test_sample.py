"""One clip, one question, streamed: the text and the command line."""

import shutil

import pytest
import torch
from scripted import SPAN

import sample
from common.pictures import Painter
from model import LATENT_END, LATENT_START
from toy import tiny


def test_streamer(tokenizer, model):
    """Breaks if words are lost or doubled between pieces, or a span has no marker and length."""
    text = f"watch the {SPAN} ball which {LATENT_START} {LATENT_END} wall<|im_end|> hits"
    ids, out = tokenizer(text, add_special_tokens=False).input_ids, []
    feed = sample.streamer(tokenizer, model.config, out.append)
    for i in range(0, len(ids), 3):
        feed(torch.tensor([ids[i : i + 3]]))
    assert "".join(out) == "watch the\n[span 1: 2 latents]\nball which\n[span 2: 0 latents]\nwall"


def test_command_line(world, tmp_path, clip):
    """Breaks if the command does not end with an answer or why there is none, or a bad clip gives
    anything but a message.
    """
    shared = {
        k: v
        for k, v in tiny.settings("sft").items()
        if k in ("image_max_tokens", "l_max", "max_length", "system")
    }

    def run(**more):
        out = []
        asked = dict(
            model=world["model"],
            video=clip(),
            key_frames="3,4",
            question="which wall ?",
            max_new_tokens=20,
        )
        sample.main(sample.Config(**{**shared, **asked, **more}), out.append)
        return "".join(out)

    strip = tmp_path / "strip.png"
    *_, answer, said = run(strip=str(strip)).splitlines()
    assert answer.startswith(("answer: ", "no answer: the response ended by "))
    assert "has no painter" in said and not strip.exists()

    # with a painter beside the model, what was imagined is drawn
    painted = shutil.copytree(world["model"], tmp_path / "painted")
    Painter(96).save(str(painted))
    assert str(strip) in run(strip=str(strip), model=str(painted)).splitlines()[-1]
    assert strip.stat().st_size > 1000
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for change, message in (
        (dict(video="gone.mp4"), "gone.mp4: no such file"),
        (dict(question=""), "--question is missing"),
        (dict(video=str(tmp_path / "text.mp4")), "text.mp4: cannot be read as a video"),
        (dict(video=str(tmp_path / "empty.mp4")), "empty.mp4: cannot be read as a video"),
        (dict(key_frames="0,9"), "numbers from 1 to 8"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(**change)
