"""The tables of latents without annotated futures: what is fed, and the figures by hand."""

import json

import pytest
import torch

from common.formats import read_rows
from model import load
from toy import video_latent
from toy.video_latent import Config, answer, difference, pick_rows, tabulate, trainings


def test_rows_are_such_as_their_scripts_take():
    """Breaks if a script no longer has a field that a row sets, a row is another's twin, or rows
    differ in steps or questions.
    """
    rows, seen = trainings(Config(steps=7)), set()
    for row in rows.values():
        config = row.script.Config(**row.settings, model="m", data="d", out="")
        seen.add(repr((row.script, config)))
        assert (row.start, row.data, config.steps) == ("base", "prompts", 7)
    assert len(seen) == len(rows)
    assert list(pick_rows(Config(rows="C,none"))) == ["none", "C"]
    with pytest.raises(SystemExit, match="--rows takes some of none, .* 'D' and 1"):
        pick_rows(Config(rows="D"))


@torch.no_grad()
def test_what_spans_are_fed(world, monkeypatch):
    """Breaks if zeros are not zeros, or a row is fed its own latents as another's."""
    model, tokenizer = load(world["model"])
    rows, fed = [row for row in read_rows(world["data"]) if row.group == "1-hop"][:3], []
    c, generate = model.config, video_latent.generate
    c.min_latents, others = 2, [i for i in range(len(tokenizer)) if i != c.latent_start_id]

    def spy(*args, **kw):
        rollout = generate(*args, **kw, banned=others)
        fed.append(torch.stack([z[:2] for z in rollout.latents]))  # (rows, 2, D): the first span
        return rollout

    monkeypatch.setattr(video_latent, "generate", spy)
    settings = dict(max_new_tokens=9, max_latents=2)
    right = answer(model, tokenizer, rows, settings, None)
    assert {name: len(values) for name, values in right.items()} == {
        "own": 3,
        "zeros": 3,
        "another's": 3,
    }
    own, zeros, others_latents = fed
    assert not zeros.any() and own.abs().min(-1).values.max() > 0
    torch.testing.assert_close(others_latents, own[[1, 2, 0]])

    answer(model, tokenizer, rows, settings, video_latent.pause)
    word = model.get_input_embeddings().weight[c.latent_id]
    assert torch.equal(fed[3], word.expand(3, 2, -1))


def test_the_tables_by_hand(tmp_path):
    """Breaks if a mean is over the wrong answers, a difference over other questions, or a figure
    of the log is not the last one.
    """
    groups = ("1-hop", "2-hop", "3-hop", "interp")

    def right(own, zeros=(0, 0), other=(0, 1)):
        return {g: {"own": own, "zeros": list(zeros), "another's": list(other)} for g in groups}

    scores = dict(pause=right([1, 0]), B=right([1, 1]), latent=right([0, 0]))
    assert difference(scores["B"], scores["pause"], "3-hop") == (0.5, 0.5)
    path = tmp_path / "log.jsonl"
    lines = [dict(answer=2.0, cosine=0.1), dict(answer=1.0, cosine=0.25), dict(cosine=0.5)]
    path.write_text("".join(json.dumps(dict(line, step=0)) + "\n" for line in lines))
    figures = video_latent.last_figures(str(path))
    assert figures == dict(answer=1.0, cosine=0.5)

    titles = dict(pause="Pause", B="Evidence", latent="SFT")
    text = tabulate([scores], [dict(B=figures, latent={}, pause={})], titles, Config())
    assert "| Evidence | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert "| Evidence | 1.000 | 0.000 | 0.500 | 1.000 |  |  | 0.500 |" in text
    assert "- Evidence: +0.500 (0.500)" in text and "- SFT: -0.500 (0.500)" in text
