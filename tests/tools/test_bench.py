"""The bench in small, on a CPU: that it runs, and that its figures are what they say."""

import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.cli import parse_config
from tools import bench, bench_cpu, bench_gpu, plan, shapes, ways
from tools.measure import Book, alternate, ratio

SMALL = dict(n=2, images=1, words=8, new_tokens=20, sft_tokens=300)


def test_each_command_has_its_flags():
    """Breaks if the door leads to another command, or takes its flags for its own."""
    argv = ["--plan", "--shape", "8b", "--gpus", "8"]
    main, cls, rest = bench.command(argv)
    assert main is plan.main and parse_config(cls, rest) == plan.Config(shape="8b", gpus=8)
    assert bench.command(["--rounds", "3", "--cpu"]) == (
        bench_cpu.main, bench_cpu.Config, ["--rounds", "3"],
    )  # fmt: skip
    assert bench.command(["--gpu", "--help"])[:2] == (bench_gpu.main, bench_gpu.Config)
    with pytest.raises(SystemExit, match="expected one of --plan, --cpu, --gpu"):
        bench.main(bench.Config())


@pytest.mark.slow
def test_the_ratios_of_a_cpu(tmp_path, capsys):
    """Breaks if a part does not run, or a figure of docs/scale.md is gone."""
    out, picture = tmp_path / "bench.json", tmp_path / "growth.png"
    sizes = dict(shape="tiny", decoder="tiny", contexts="20,40", groups="1,2", rounds=1)
    config = bench_cpu.Config(out=str(out), picture=str(picture), **sizes, **SMALL)
    bench_cpu.main(config)
    figures, text = json.loads(out.read_text()), capsys.readouterr().out
    for comparison in (figures["update"], *figures["sft"].values()):
        for name, figure in comparison.items():
            if name != "lengths":
                assert len(figure["seconds"]) == 1 and figure["seconds"][0] > 0
                assert figure["bytes"] > 1e6, name
    assert figures["update"]["ours"]["bytes"] < figures["update"]["prompt copied"]["bytes"]
    growth = figures["growth"]
    assert [[x for x, _ in points] for points in growth.values()] == [[20, 40], [1, 2], [1, 2]]
    seconds = figures["decoding"]["ours"]["seconds"][0]
    assert f"ours: {2 * 20 / seconds:.1f} tokens a second; 5 MiB by formula" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "uneven rows of [150, 225, 300, 525] tokens" in text


@pytest.mark.slow
def test_the_gpu_bench_on_a_cpu(tmp_path, capsys, monkeypatch):
    """Breaks if a part does not run where there is no GPU, or does not say so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "bench.json"
    bench_gpu.main(bench_gpu.Config(shape="tiny", prompts=1, out=str(out), **SMALL))
    book, text = json.loads(out.read_text()), capsys.readouterr().out
    assert book["missing"] == {"tiny: decoding, captured": "not run: no GPU"}
    assert len(book["figures"]) == 9
    ours = book["figures"]["tiny: decoding"]
    step, model = ours["ms a step"] / 1e3, shapes.weights("tiny")
    assert step * 19 + ours["prompts_s"] == pytest.approx(2 * 20 / ours["tokens/s"])
    read = 4 * (model.total - model.vision + 2 * 2 * 1024 * (258 + 8 + 2 * 10))
    floor = read / book["card"]["bandwidth"]
    assert ours["share of the floor"] == pytest.approx(floor / step)
    sft = book["figures"]["tiny: SFT"]
    flops = sft["share of the peak"] * book["card"]["peak"] * 300 / sft["tokens/s"]
    # what follows the prompt: words, and the two ends of four spans
    assert flops == pytest.approx(bench_gpu.sft_flops("tiny", 2, 300, 300 - 258 - 8 - 16))
    assert all(figures.get("GiB") is None for figures in book["figures"].values())
    assert "| CPU, fp32: no GPU's figures, torch" in text
    assert "| decoding, captured | not run: no GPU |" in text
    assert (
        f"| update, prompt copied, s | {book['figures']['tiny: update, prompt copied']['s']:,.4g}"
        in text
    )


def test_flops_are_those_of_the_products():
    """Breaks if a matrix is not counted, or counted too often: forward and backward, exactly."""
    config = bench_gpu.Config(shape="tiny", images=0, words=40)
    model = bench_cpu.make_trainable("tiny")
    batch = shapes.prompt(config, 1, "cpu")
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :31] = -100
    with FlopCounterMode(display=False) as counter:
        ways.sft(model, batch)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 6 * 2 * 8 * 128 * 40**2  # layers, width of queries, tokens
    assert bench_gpu.sft_flops("tiny", 2, 40, 9) == products + attention


def test_a_book_has_to_end(capsys):
    """Breaks if a measurement begins too late, or one that fails takes the others with it."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken():
        raise KeyError("x")

    saved = []
    book = Book(time.time() + 100, save=lambda book: saved.append(len(book.figures)))
    assert book.measure("first", 50, lambda: dict(s=1.0)) == dict(s=1.0)
    assert book.measure("second", 200, lambda: dict(s=2.0)) is None
    assert book.measure("third", 10, full) is None and book.measure("fourth", 10, broken) is None
    assert book.measure("fifth", 10, lambda: "a model") == "a model"
    assert book.figures == {"first": dict(s=1.0)} and book.failed == ["fourth"]
    assert book.missing == {
        "second": "not run: no time left", "third": "out of memory", "fourth": "failed: KeyError",
    }  # fmt: skip
    assert saved == [1] * 4 and "KeyError: 'x'" in capsys.readouterr().err


def test_a_failed_measurement_is_an_error_at_the_end(tmp_path, capsys, monkeypatch):
    """Breaks if a run with a failure ends as if there were none, or without its other figures."""

    def measure_decoding(config, shape, device, card, book):
        book.measure(f"{shape}: decoding", 1, lambda: {}["gone"])
        book.measure(f"{shape}: update", 1, lambda: dict(s=2.0, GiB=3.0, mark=" (9 of 36 layers)"))

    monkeypatch.setattr(bench_gpu, "measure_decoding", measure_decoding)
    monkeypatch.setattr(bench_gpu, "measure_trainings", lambda *args: None)
    with pytest.raises(SystemExit, match="^failed: 8b: decoding$"):
        bench_gpu.main(bench_gpu.Config(shape="2b,8b"[3:], out=str(tmp_path / "b.json")))
    text = capsys.readouterr().out
    assert (
        "| update, GiB | 3 (9 of 36 layers) |" in text and "| decoding | failed: KeyError |" in text
    )


def test_ratios_are_of_the_same_round():
    """Breaks if rounds are mixed, or the ways do not take turns."""
    assert ratio([1, 6, 3], [2, 4, 3]) == (1, 0.5, 1.5)
    turns = []
    times = alternate({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2)
    assert turns == ["a", "b"] * 2 and [len(x) for x in times.values()] == [2, 2]


@pytest.mark.parametrize("new_tokens, shortest", [(1, 1), (16, 1), (19, 0.5), (64, 0.25)])
def test_a_group_holds_four_spans(new_tokens, shortest):
    """Breaks if a span overwrites another's end, or rows and latents do not belong together."""
    config, ids = bench_cpu.Config(new_tokens=new_tokens, n=3), shapes.special("50m")
    rollout = shapes.random_group(config, 8, "cpu", shortest)
    longest = max(16, new_tokens)
    assert rollout.lengths.tolist()[::2] == [max(16, int(shortest * longest)), longest]
    for row, said, length, latents in zip(
        rollout.tokens, rollout.sampled, rollout.lengths, rollout.latents
    ):
        assert said.tolist() == [True] * length + [False] * (longest - length)
        row = row[:length].tolist()
        starts = [i for i, token in enumerate(row) if token == ids.latent_start]
        assert len(starts) == 4
        for i in starts:
            assert row[i + 1 : i + 4] == [ids.latent, ids.latent, ids.latent_end]
        assert latents.shape == (8, 8) == (row.count(ids.latent), 8)


def test_special_tokens_of_a_small_vocabulary():
    """Breaks if a small model knows its special tokens by other ids than the inputs have."""
    ids, config = shapes.special("50m"), shapes.make("50m", device="meta").config
    assert max(ids) < 32768 == config.text_config.vocab_size
    assert (ids.image, ids.video) == (config.image_token_id, config.video_token_id)
    assert (ids.vision_start, ids.eos) == (config.vision_start_token_id, 32768 - 291)
    assert ids.latent == config.latent_id and shapes.special("2b") == shapes.Special()
    stock = shapes.Qwen3VLConfig()
    assert stock.image_token_id == shapes.Special().image
    assert stock.vision_end_token_id == shapes.Special().vision_end


@pytest.mark.parametrize("cls", [bench_gpu.Config, shapes.Config])
def test_a_shape_that_is_none(cls):
    """Breaks if a misspelt shape is a KeyError deep inside."""
    with pytest.raises(ValueError, match="shape is '3b', expected one of 2b, 4b, 8b, tiny"):
        cls(shape="3b")


def test_a_model_folder(world, tmp_path):
    """Breaks if a model is written beside a tokenizer whose ids do not fit."""
    out = tmp_path / "model"
    config = shapes.Config(shape="tiny", layers=1, out=str(out), tokenizer=world["model"])
    with pytest.raises(SystemExit, match="the latent tokens get .* expected"):
        shapes.main(config)
    assert not out.exists()
