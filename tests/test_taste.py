"""What comes with the repository: the tiny trained model answers, imagines and is small; the
walk-through runs.
"""

import os
import runpy
from pathlib import Path

import pytest
import torch

import sample
from common.formats import read_rows
from common.machine import Machine
from common.painter import Painter, look, painting_error
from data import DataConfig
from tools import pictures

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shipped():
    """The shipped model's answers to the shipped questions -> painter, answers, budget, model."""
    _, config = sample.shipped(pictures.Config(), 1)
    model, tokenizer = Machine().load(config.model)
    rows = read_rows(str(ROOT / "taste" / "questions.jsonl"))
    answers = pictures.answer(model, tokenizer, rows, config)
    return Painter.beside(config.model), answers, config.budgets[1], model


def test_sample_without_arguments(tmp_path):
    """Breaks if the first command a stranger types does not answer, or draws nothing."""
    out, strip, listed = [], str(tmp_path / "imagined.png"), []
    row, _ = sample.shipped(DataConfig(), sample.Config().ask)
    answer = sample.main(sample.Config(strip=strip), out.append)
    text = "".join(out)
    assert answer.strip() in row.options and text.startswith(row.question)
    assert "[span 1: 1 latent]" in text and f"what came: {row.answer}" in text
    assert os.path.getsize(strip) > 2000
    sample.main(sample.Config(list=True), listed.append)
    lines = "".join(listed).splitlines()
    assert len(lines) == 8 and lines[0] == (
        "1  taste/clips/6000000.mp4, key frames 2,3: which wall does the ball hit next ?"
    )
    with pytest.raises(SystemExit, match="--ask takes 1 to 8, found 9"):
        sample.main(sample.Config(ask=9), out.append)


def test_what_is_shipped_is_small_and_whole():
    """Breaks if a training's state is shipped, or the card does not say how it was made."""
    sizes = {p.relative_to(ROOT): p.stat().st_size for p in ROOT.glob("taste/**/*") if p.is_file()}
    assert sum(sizes.values()) < 4_400_000
    assert not [path for path in sizes if path.suffix == ".pt"]
    card = (ROOT / "taste" / "README.md").read_text()
    assert "commit ?" not in card and "bash toy/taste.sh" in card


def test_it_answers_and_imagines(shipped):
    """Breaks if what is shipped is not the trained model, or a picture shows more than its latent:
    the same painter, given another clip's latents, does not paint this clip's future.
    """
    painter, answers, budget, model = shipped
    assert sum(a.right for a in answers) >= 6 and all(a.spans for a in answers)
    first = torch.cat([a.spans[0] for a in answers])  # (8, D) four of each clip
    came = look(model, [a.row.futures[0] for a in answers], budget)
    own = painting_error(painter, first, came.cells)
    assert own < 0.4 and painting_error(painter, first.roll(4, 0), came.cells) > 2 * own
    errors = pictures.errors_of(painter, answers, budget)
    assert errors["imagined 1"] == pytest.approx(own, rel=1e-3)
    # and a true token is painted as what it shows: the painter is this tower's
    assert (painter(came.e) - came.cells).square().mean().item() < 0.003


def test_the_start_for_rl():
    """Breaks if the start for RL does not imagine each hit, or is not trained in fp32."""
    row, config = sample.shipped(pictures.Config(), 4)
    model, tokenizer = Machine().load(str(ROOT / "taste" / "sft"), train=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rows = read_rows(str(ROOT / "taste" / "questions.jsonl"))
    answers = pictures.answer(model.eval(), tokenizer, rows, config)
    assert sum(a.right for a in answers) >= 4 and len(rows) == 8
    assert [len(a.spans) for a in answers] == [1, 2, 3, 4] * 2


def test_the_walk_through(tmp_path, monkeypatch, capsys):
    """Breaks if a cell fails, prints nothing, is long, or the step does not do what it says."""
    path = ROOT / "docs" / "walkthrough.py"
    cells = path.read_text().split("\n# %%")[1:]
    assert len(cells) >= 12 and all(len(cell.strip().splitlines()) <= 18 for cell in cells)
    assert all("print(" in cell for cell in cells[1:])
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path))
    assert (tmp_path / "imagined.png").stat().st_size > 2000
    assert "as decoded, within" in capsys.readouterr().out
    A, change = names["A"], names["change"]
    assert A.abs().max() > 0 and (A * change).sum() > 0
