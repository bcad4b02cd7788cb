"""Latents back to pixels: cells in their places, an honest painter, and what is drawn of it."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from common import pictures
from common.clips import normalise, resize_and_cut
from common.folder import model_fingerprint
from common.formats import Frame, Row
from common.pictures import Painter, painting_error, to_cells, to_pixels
from model import load
from tests.conftest import frames
from tools.pictures import Config, Pairs, teach


def test_cells_stand_where_their_pixels_are():
    """Breaks if patches are put back in another order than they were cut in."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3)).astype(np.uint8)
    patches, grid = resize_and_cut(picture, 1024, 64 * 96)
    cells = to_cells(patches)
    assert grid.tolist() == [1, 4, 6] and cells.shape == (6, 3, 32, 32)
    second_row = picture[0, 32:64, 32:64].transpose(2, 0, 1) / 255
    assert np.allclose(cells[4], second_row, atol=1e-6)  # 2 rows of 3 cells: the middle one below
    assert np.array_equal(to_pixels(cells, 3), picture[0])


def encoded(n, seed):
    """n cells of a bright spot on grey, and tokens that tell where it is, nothing else -> Pairs."""
    rng = np.random.default_rng(seed)
    places = torch.tensor(rng.uniform(6, 26, (n, 2)), dtype=torch.float32)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    distance = (y - places[:, :1, None]) ** 2 + (x - places[:, 1:, None]) ** 2
    spots = (0.3 + 0.6 * torch.exp(-distance / 18))[:, None].expand(-1, 3, -1, -1)
    mix = torch.randn(2, 12, generator=torch.Generator().manual_seed(7))
    return Pairs((places - 16) @ mix / 6, spots.contiguous())


def test_a_painter_learns_and_is_honest():
    """Breaks if it does not learn, or if a picture shows anything but what its token says."""
    painter = teach(encoded(2000, 0), Config(steps=250, batch=32, lr=3e-3))
    e, cells = encoded(100, 1)
    assert painting_error(painter, e, cells) < 0.15
    assert painting_error(painter, e.roll(1, 0), cells) > 1  # another's token: not its own picture
    brightest = painter(e)[:, 0].flatten(1).argmax(1)
    true = cells[:, 0].flatten(1).argmax(1)
    rows_off, columns_off = (brightest // 32 - true // 32).abs(), (brightest % 32 - true % 32).abs()
    assert rows_off.median() <= 1 and columns_off.median() <= 1


def test_the_error_by_hand():
    """Breaks if 1 is not the mean cell's error, or 0 not that of the truth."""
    painter = Painter(4)
    painter.blank.fill_(0.5)
    torch.nn.init.zeros_(painter.grow[-1].weight)
    cells = torch.rand(3, 3, 32, 32)
    bias = painter.grow[-1].bias
    torch.nn.init.zeros_(bias)
    assert painting_error(painter, torch.randn(3, 4), cells) == pytest.approx(1)
    assert painting_error(painter, torch.randn(3, 4), torch.full_like(cells, 0.6)) == 1
    torch.nn.init.constant_(bias, 0.05)  # half of the way from .5 to .6: a quarter of the square
    error = painting_error(painter, torch.randn(3, 4), torch.full_like(cells, 0.6))
    assert error == pytest.approx(0.25, abs=1e-4)


def test_too_few_and_too_many_latents_are_seen():
    """Breaks if a short span looks whole, or what a long one imagined is hidden."""
    painter, e = Painter(8), torch.randn(5, 8)
    whole = painter.picture(e[:4], (2, 2))
    assert whole.shape == (64, 64, 3)
    short = painter.picture(e[:3], (2, 2))
    assert (short[32:, 32:] == 204).all() and np.array_equal(short[:32], whole[:32])
    assert painter.picture(e, (2, 2)).shape == (96, 64, 3)
    assert (painter.picture(e[:0], (1, 2)) == 204).all()


@pytest.fixture
def painted_model(model, tokenizer, tmp_path):
    """A model's folder with a painter beside it."""
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    return folder, Painter(96).half().float()


def test_a_painter_lies_beside_the_model(painted_model):
    """Breaks if the folder is another model with it, or another painter comes back."""
    folder, painter = painted_model
    before = model_fingerprint(folder)
    assert Painter.beside(folder) is None
    painter.save(folder)
    assert model_fingerprint(folder) == before
    load(folder)
    again = Painter.beside(folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), painter.state_dict().values())
    )


def test_spans_are_painted_for_the_report(painted_model, clip):
    """Breaks if a span gets another's picture, or a model without a painter fails."""
    folder, painter = painted_model
    model, _ = load(folder)
    path = clip(height=64, width=64)
    row = Row("f:0", "0", [Frame(path, 1), "?"], [Frame(path, 4)], "A", "?", ["one", "two"])
    latents, budget = torch.randn(3, 96), (1024, 4 * 1024)
    assert pictures.imagined(model, row, latents, [1, 0, 2], budget)["painted"] == []
    painter.save(folder)
    info = pictures.imagined(model, row, latents, [1, 0, 2], budget)
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in info["painted"]]
    spans = [latents[:1], latents[:0], latents[1:]]
    for image, span in zip(images, spans, strict=True):
        assert np.array_equal(np.array(image), painter.eval().picture(span, (2, 2)))


def test_true_frames_and_their_tokens_pair_up(model, clip):
    """Breaks if the k-th token is not what the tower says of the k-th frame's cell."""
    from tools.pictures import look

    path = clip(height=32, width=32)
    pairs = look(model, [Frame(path, k) for k in (5, 2)], (1024, 1024))
    picture = to_pixels(pairs.cells[1:], 1)
    patches, grid = resize_and_cut(picture[None], 1024, 1024)
    e = model.encode_frames(normalise(patches), grid[None])
    assert torch.allclose(pairs.e[1:], e, atol=1e-5)
    assert not torch.allclose(pairs.e[:1], e, atol=1e-2)


def test_coming_frames_by_hand():
    """Breaks if a frame that is shown counts as coming, or one before the first shown."""
    shown = [Frame("c", k) for k in (3, 4, 7)]
    assert [frame.index for frame in pictures.coming(shown)] == [5, 6, 8]
    assert pictures.coming([]) == [] and pictures.coming([Frame("c", 8)]) == []


def test_a_strip_shows_its_pictures_in_their_places(tmp_path):
    """Breaks if a picture is missing, in another's place, or a wrong answer looks right."""
    flat = [np.full((32, 32, 3), 40 * k, np.uint8) for k in range(1, 6)]
    strips = [pictures.Strip(flat[:2], flat[2:4], flat[4:], "which ?", "red: wrong", False)]
    path = str(tmp_path / "deep" / "strip.png")
    pictures.draw_strips(strips, path)
    sheet = np.array(Image.open(path)).astype(int)
    grey = (sheet == sheet[:, :, :1]).all(-1)
    columns = []
    for k in range(1, 6):  # each is 96 x 96 of its grey
        place = grey & (sheet[:, :, 0] == 40 * k)
        assert place.sum() >= 96 * 96
        columns.append(int(np.median(np.nonzero(place)[1])))
    assert columns == sorted(columns) and len(set(columns)) == 5
    assert (sheet == pictures.WRONG).all(-1).any() and not (sheet == pictures.RIGHT).all(-1).any()


def test_an_answer_moves_word_by_word(tmp_path):
    """Breaks if a span's picture is there before its words, or what came is shown too early."""
    moving = frames(5, 32, 32)
    strip = pictures.Strip(moving[:2], moving[2:3], moving[3:4], "which ?", "red: right", True)
    pictures.animate(strip, ["goes up", "hits red"], str(tmp_path / "a.gif"))
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 1 + 2 + 4 + 2 + 1
    colours = []
    for n in range(gif.n_frames):
        gif.seek(n)
        shot = np.array(gif.convert("RGB")).astype(int)
        has = {}
        for kind, colour in pictures.COLOURS.items():
            has[kind] = bool((np.abs(shot - colour).max(-1) < 12).sum() > 300)
        colours.append(has)
    assert all(has["seen"] for has in colours)
    assert [has["imagined"] for has in colours] == [False] * 3 + [True] * 7
    assert [has["came"] for has in colours] == [False] * 9 + [True]
