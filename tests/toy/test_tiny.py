"""The tiny tokenizer is one like any other, and the settings are such as their scripts take."""

import json
import re

import pytest
import torch

import curate
import evaluate
import la_dapo
import sft
from common.cli import read_saved
from common.formats import read_record
from model import load
from tools import pictures
from toy import tiny
from variants import opd, video_latent


def test_the_command_knows_the_words_of_its_files(world, tmp_path):
    """Breaks if a word of the records is unknown, if the seed does not decide the weights, or what
    is written is not a model's folder.
    """
    data = ",".join(world["data"].replace("train", name) for name in ("captions", "train"))
    states = []
    for seed in (0, 0, 1):
        out = str(tmp_path / str(len(states)))
        tiny.main(tiny.Config(data=data, out=out, seed=seed))
        model, tokenizer = load(out)
        states.append(model.state_dict()["lm_head.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    text = "watch the clip <reason> moves right up </reason> hits yellow third x3 y23"
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    for name, script in (("sft", sft), ("rl", la_dapo), ("curate", curate), ("eval", evaluate)):
        saved = read_saved(f"{out}/{name}.json", script.Config)
        assert script.Config(**saved).system == "watch the clip and answer"


def test_each_format_gives_its_words():
    """Breaks if words of a format, its options or the letters that are shown, are unknown."""
    texts = []
    with open("docs/data.md") as f:
        for i, block in enumerate(re.findall(r"```json\n(.*?)```", f.read(), re.S)):
            texts += tiny.words_of([read_record(json.loads(block), f"data.md:{i}")])
    words = set(" ".join(texts).split())
    assert set("left yellow shelf. water A) B wall sits letter wins.".split()) <= words
    assert not {"THOUGHT", "<image>", "<rimage>"} & words


@pytest.mark.parametrize(
    "path, script",
    [
        ("toy/captions.json", sft),
        ("toy/sft.json", sft),
        ("toy/rl.json", la_dapo),
        ("toy/curate.json", curate),
        ("toy/eval.json", evaluate),
        ("toy/pictures.json", pictures),
        ("variants/opd.json", opd),
        ("variants/video_latent.json", video_latent),
    ],
)
def test_settings_fit_their_scripts(path, script):
    """Breaks if a script no longer has a flag that a file sets, or a file says what is the
    script's default anyway.
    """
    saved, own = read_saved(path, script.Config), vars(script.Config())
    assert [name for name in saved if own[name] == saved[name]] == []
