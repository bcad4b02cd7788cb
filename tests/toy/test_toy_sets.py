"""The world with its frames side by side, and the errors of a frame's tokens."""

from types import SimpleNamespace

import pytest
import torch

from common.formats import read_record
from data import DataConfig, encode
from model import LATENT_IDS
from toy.set_spans import blocks_of, by_token, joined, prompt_of
from toy.world import questions
from variants.set_spans import find_blocks


def test_frames_come_before_they_are_put_into_words():
    """Breaks if a word is lost, or stands between two frames."""
    rows = [joined(row) for row in questions(3, 1.05, "clip.mp4")]
    for before, row in zip(questions(3, 1.05, "clip.mp4"), rows):
        old, new = (read_record(r, "here").response for r in (before, row))
        frames = [part for part in new if not isinstance(part, str)]
        assert new[0] == old[0] and new[1 : 1 + len(frames)] == frames
        assert len(new) == 2 + len(frames) and new[-1].split() == " ".join(old[2::2]).split()
        assert frames == old[1::2] and len(frames) == len(row["reasoning_image"])


def test_a_row_of_the_world_is_one_block(world, tokenizer):
    """Breaks if a prompt holds part of its response, or the lengths are not the row's."""
    config = DataConfig(image_max_tokens=4, l_max=4, system="watch the ball")
    row = read_record(joined(questions(0, 1.05, world["folder"] + "/data/clips/0.mp4")[2]), "here")
    sample = encode(row, tokenizer, config)
    ids = tokenizer.convert_tokens_to_ids(list(LATENT_IDS.values()))
    c = SimpleNamespace(**dict(zip(LATENT_IDS, ids)))  # a model's config
    assert blocks_of(sample, c) == [[4, 4, 4]]
    prompt = prompt_of(sample)
    assert prompt["ids"] == encode(row, tokenizer, config, train=False)["ids"]
    assert find_blocks(prompt["ids"], c) == [] and prompt["futures"] == []


def test_the_error_of_each_token_by_hand():
    """Breaks if tokens are mixed up, or frames are not averaged."""
    e = torch.zeros(8, 2)
    z = torch.arange(8.0)[:, None].expand(8, 2)
    assert by_token(z, e, 2.0) == pytest.approx([(k**2 + (k + 4) ** 2) / 4 for k in range(4)])
