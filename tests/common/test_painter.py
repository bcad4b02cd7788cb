"""Latents back to pixels: cells in their places, errors by hand, and what is drawn of them."""

import base64
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common import painter as painting
from common.clips import normalise, resize_and_cut
from common.folder import model_fingerprint
from common.formats import Frame, Row
from common.painter import Config, Painter, look, painting_error, to_cells, to_pixels
from model import load


def test_cells_stand_where_their_pixels_are():
    """Breaks if patches are put back in another order than they were cut in."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3)).astype(np.uint8)
    patches, grid = resize_and_cut(picture, 1024, 64 * 96)
    cells = to_cells(patches)
    assert grid.tolist() == [1, 4, 6] and cells.shape == (6, 3, 32, 32)
    second_row = picture[0, 32:64, 32:64].transpose(2, 0, 1) / 255
    assert np.allclose(cells[4], second_row, atol=1e-6)  # 2 rows of 3 cells: the middle one below
    assert np.array_equal(to_pixels(cells, 3), picture[0])


def test_the_error_by_hand():
    """Breaks if 1 is not the mean cell's error, or 0 not that of the truth."""
    painter = Painter(4)
    painter.blank.fill_(0.5)
    torch.nn.init.zeros_(painter.grow[-1].weight)
    bias, e, flat = painter.grow[-1].bias, torch.randn(3, 4), torch.full((3, 3, 32, 32), 0.6)
    # what is painted is 0.5 + bias: the whole way from .5 to .6, half of it (a quarter of the
    # squared error), and none
    for value, error in ((0.1, 0), (0.05, 0.25), (0.0, 1)):
        torch.nn.init.constant_(bias, value)
        assert painting_error(painter, e, flat) == pytest.approx(error, abs=1e-4)
    assert painting_error(painter, e, torch.rand(3, 3, 32, 32)) == pytest.approx(1)


def test_too_few_and_too_many_latents_are_seen():
    """Breaks if a short span looks whole, or part of what a long one imagined is hidden."""
    painter, e = Painter(8), torch.randn(5, 8)
    whole = painter.picture(e[:4], (2, 2))
    assert whole.shape == (64, 64, 3)
    short = painter.picture(e[:3], (2, 2))
    assert (short[32:, 32:] == 204).all() and np.array_equal(short[:32], whole[:32])
    assert painter.picture(e, (2, 2)).shape == (96, 64, 3)


def test_spans_are_painted_with_the_painter_of_the_model(model, tokenizer, tmp_path, film):
    """Breaks if another painter comes back, the folder counts as another model with it, a span
    gets another's picture, or a model without a painter or a clip that is gone fails.
    """
    folder, path = str(tmp_path / "model"), film()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    before, painter = model_fingerprint(folder), Painter(96, width=32).half().float().eval()
    model, _ = load(folder)
    row = Row("f:0", "0", [Frame(path, 1), "?"], [Frame(path, 4)], "A", "?", ["one", "two"])
    latents, budget = torch.randn(3, 96), (1024, 4 * 1024)
    assert Painter.beside(folder) is None
    assert painting.imagined(model, row, latents, [1, 0, 2], budget)["painted"] == []

    painter.save(folder)
    assert model_fingerprint(folder) == before
    again = Painter.beside(folder).state_dict()
    assert all(torch.equal(w, again[name]) for name, w in painter.state_dict().items())
    info = painting.imagined(model, row, latents, [1, 0, 2], budget)
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in info["painted"]]
    for image, span in zip(images, latents.split([1, 0, 2]), strict=True):
        assert np.array_equal(np.array(image), painter.picture(span, (2, 2)))
    gone = Row("f:0", "0", [Frame("gone.mp4", 1), "?"], [], "A")
    found = painting.imagined(model, gone, latents, [3], budget)
    assert found == dict(error="gone.mp4: no such file")


def test_true_frames_and_their_tokens_pair_up(model, film, capsys):
    """Breaks if the k-th token is not that of the k-th frame's cell, or one bad clip ends the run
    or goes unnamed.
    """
    path, budget = film(height=32, width=32), (1024, 1024)
    pairs = look(model, [Frame(path, 5), Frame("gone.mp4", 1), Frame(path, 2)], budget)
    assert "gone.mp4: no such file" in "".join(capsys.readouterr()) and len(pairs.e) == 2
    picture = to_pixels(pairs.cells[1:], 1)
    patches, grid = resize_and_cut(picture[None], *budget)
    e = model.encode_frames(normalise(patches), grid[None])
    assert torch.allclose(pairs.e[1:], e, atol=1e-5)
    assert not torch.allclose(pairs.e[:1], e, atol=1e-2)
    with pytest.raises(SystemExit, match="no frame can be read"):
        look(model, [Frame("gone.mp4", 1)], budget)


def test_the_command_holds_clips_out(world, tmp_path, monkeypatch, capsys):
    """Breaks if nothing is saved, the error is not printed, or a clip of the held-out frames is
    among those that the painter learns from.
    """
    looked, model = [], shutil.copytree(world["model"], tmp_path / "model")
    inner = painting.look
    monkeypatch.setattr(painting, "look", lambda m, f, b: looked.append(f) or inner(m, f, b))
    settings = dict(l_max=1, model=str(model), steps=3, frames=20)
    error = painting.main(Config(**settings, data=world["data"]))
    learnt, held_out = ({frame.source for frame in some} for some in looked)
    assert learnt and held_out and not learnt & held_out
    assert 0 < error < 10 and Painter.beside(str(model)) is not None
    assert f"{error:.3f}  true frames, held out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--data is missing"):
        painting.main(Config(**settings))


def test_coming_frames_by_hand():
    """Breaks if a frame that is shown counts as coming, or one before the first shown does."""
    shown = [Frame("c", k) for k in (3, 4, 7)]
    assert [frame.index for frame in painting.coming(shown)] == [5, 6, 8]
    assert painting.coming([]) == [] and painting.coming([Frame("c", 8)]) == []


def test_a_strip_shows_its_pictures_in_their_places(tmp_path):
    """Breaks if a picture is missing or in another's place, or a wrong answer looks right."""
    flat = [np.full((32, 32, 3), 40 * k, np.uint8) for k in range(1, 6)]
    strips = [painting.Strip(flat[:2], flat[2:4], flat[4:], "which ?", "red: wrong", False)]
    path = str(tmp_path / "deep" / "strip.png")
    painting.draw_strips(strips, path)
    sheet = np.array(Image.open(path)).astype(int)
    grey = (sheet == sheet[:, :, :1]).all(-1)
    columns = []
    for k in range(1, 6):  # each is 96 x 96 of its grey
        place = grey & (sheet[:, :, 0] == 40 * k)
        assert place.sum() >= 96 * 96
        columns.append(int(np.median(np.nonzero(place)[1])))
    assert columns == sorted(columns) and len(set(columns)) == 5
    assert (sheet == painting.WRONG).all(-1).any() and not (sheet == painting.RIGHT).all(-1).any()
