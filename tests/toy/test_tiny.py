"""The tiny model knows the words of its files, and the seed decides its weights."""

import json
import re

import torch

from common.formats import read_record
from model import load
from toy import tiny


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


def test_each_format_gives_its_words():
    """Breaks if words of a format, its options or the letters that are shown, are unknown."""
    texts = []
    with open("docs/data.md") as f:
        for i, block in enumerate(re.findall(r"```json\n(.*?)```", f.read(), re.S)):
            texts += tiny.words_of([read_record(json.loads(block), f"data.md:{i}")])
    words = set(" ".join(texts).split())
    assert set("left yellow shelf. water A) B wall sits letter wins.".split()) <= words
    assert not {"THOUGHT", "<image>", "<rimage>"} & words
