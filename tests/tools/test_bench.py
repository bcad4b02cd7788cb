"""The bench in small, on a CPU: that it runs, and that its figures are what they say."""

import json
import math

import pytest
import torch

from tools import bench


def test_every_measurement_runs(tmp_path, capsys, monkeypatch):
    """Breaks if a part does not run, also where 4 spans do not fit in the decoded tokens, or if a
    figure of docs/scale.md is gone.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "bench.json"
    sizes = dict(prompts=1, n=2, images=1, words=8, new_tokens=6, sft_tokens=300)
    bench.main(bench.Config(shape="tiny", out=str(path), **sizes))
    figures = json.loads(path.read_text())
    decoding = ["decode tokens/s, ours", "decode tokens/s, transformers", "decode prompt seconds"]
    ways = ("", ", 1 adjoint term", ", exact (8 terms)", ", a prompt a rollout")
    for name in [*decoding, "sft tokens/s", *(f"rl update s{way}" for way in ways)]:
        assert figures[name] > 0, name
    memory = ["decode GiB, ours", "decode GiB, transformers", "sft GiB"]
    for name in [*memory, *(f"rl update GiB{way}" for way in ways)]:
        assert math.isnan(figures[name]), name
    assert figures["decode ratio, ours"] == pytest.approx(
        figures[decoding[0]] / figures[decoding[1]], abs=0.01
    )
    assert 0 < figures["bf16 sdpa relative error"] < 0.05
    assert 0 < figures["bf16 ours relative error"] < 0.05
    real = bench.make("tiny")
    assert figures["parameters"] == sum(p.numel() for p in real.parameters())
    assert "sft tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("new_tokens", [1, 16, 19, 64])
def test_a_group_holds_four_spans(new_tokens):
    """Breaks if a span overwrites another's end, or rows and latents do not belong together."""
    rollout = bench.random_group(bench.Config(new_tokens=new_tokens, n=3), 8, "cpu")
    for row, latents in zip(rollout.tokens, rollout.latents):
        ids = row.tolist()
        starts = [i for i, token in enumerate(ids) if token == bench.IDS["latent_start_id"]]
        assert len(starts) == 4 and len(ids) == max(16, new_tokens)
        for i in starts:
            assert ids[i + 1 : i + 4] == [*[bench.IDS["latent_id"]] * 2, bench.IDS["latent_end_id"]]
        assert latents.shape == (8, 8) == (ids.count(bench.IDS["latent_id"]), 8)


def test_a_shape_that_is_none():
    """Breaks if a misspelt shape is a KeyError deep inside."""
    with pytest.raises(ValueError, match="shape is '3b', expected one of 2b, 4b, 8b, tiny"):
        bench.Config(shape="3b")


def test_another_tokenizer_is_refused(world, tmp_path):
    """Breaks if a model is written beside a tokenizer whose ids do not fit."""
    out = tmp_path / "model"
    config = bench.Config(shape="tiny", layers=1, save=str(out), tokenizer=world["model"])
    with pytest.raises(SystemExit, match="the latent tokens get .* expected"):
        bench.main(config)
    assert not out.exists()
