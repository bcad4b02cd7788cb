"""The demo and its tables: the plan by hand, the folder's guard, and the whole in small through
its own commands.
"""

import dataclasses
import json
import subprocess
import sys

import pytest

from toy import __main__ as demo
from toy import plan as demo_plan
from toy import tables
from toy.plan import CURATED


def test_the_demos_plan():
    """Breaks if a training starts from another, learns from other rows, or for another time."""
    config = demo.Config(pretrain_steps=5, sft_steps=3, rl_steps=2)
    plan = demo.trainings(config)
    assert {name: (t.start, t.data, t.settings["steps"]) for name, t in plan.items()} == {
        "base": ("untrained", "captions", 5),
        "text": ("base", "train", 3),
        "latent": ("base", "train", 3),
        "la-dapo": ("latent", "prompts", 2),
    }


def test_no_two_things_of_a_seed_share_a_folder():
    """Breaks if a training of the curation is taken for what a row of the tables starts from."""
    rows = tables.all_rows(tables.Config())
    assert not {*rows, *(row.start for row in rows.values())} & set(CURATED)


def test_every_row_is_one_its_script_takes():
    """Breaks if a script no longer has a field that a row sets, or a row is another's twin."""
    rows, seen = tables.all_rows(tables.Config()), {}
    for name, row in rows.items():
        config = row.script.Config(**row.settings, model=row.start, data=row.data, out="")
        assert row.start in ("untrained", *rows), name
        assert seen.setdefault(repr((row.script, config)), name) == name


def test_rows_come_with_what_they_start_from():
    """Breaks if a row's start is not trained, the order is not the tables', or a typing error is
    taken for nothing.
    """
    assert list(tables.pick_rows(tables.Config(rows="text-rl"))) == ["base", "text", "text-rl"]
    names = list(tables.pick_rows(tables.Config(rows="dapo,pause")))
    assert names == ["base", "latent", "pause", "dapo"]
    assert len(tables.pick_rows(tables.Config())) == len(tables.all_rows(tables.Config()))
    with pytest.raises(SystemExit, match="--rows takes some of base, text, .* 'latnt' and 3"):
        tables.pick_rows(tables.Config(rows="latnt"))
    with pytest.raises(SystemExit, match="--seeds at least 1"):
        tables.pick_rows(tables.Config(seeds=0))


def test_a_table_by_hand():
    """Breaks if a mean is not over seeds, a deviation not that of a sample, or a title lost."""
    seeds = []
    for a, b in ((0.1, 0.5), (0.3, 0.5)):
        scores = {"1-hop": dict(accuracy=a), "all": dict(accuracy=b)}
        seeds.append({"text": scores, "x": scores})
    assert demo.markdown(seeds, {"text": "text-only SFT"}, ["1-hop"]).splitlines() == [
        "| | 1-hop | avg |",
        "|---|---|---|",
        "| text-only SFT | 0.200 ± 0.141 | 0.500 ± 0.000 |",
        "| x | 0.200 ± 0.141 | 0.500 ± 0.000 |",
    ]
    assert demo.spread([0.25]) == "0.250"


def test_a_folder_of_other_settings_is_refused(tmp_path):
    """Breaks if two worlds are mixed in one folder, --fresh deletes what is not the toy's, or the
    tables cannot go on where the demo was.
    """
    config = demo.Config(out=str(tmp_path / "toy"))
    demo.claim_folder(config)
    demo.claim_folder(tables.Config(out=config.out, seeds=2, rows="text", workers=1))
    with pytest.raises(SystemExit, match="other values of bend, sft_steps .*--fresh"):
        demo.claim_folder(dataclasses.replace(config, bend=0.5, sft_steps=9))
    (tmp_path / "toy" / "seed_0").mkdir()
    demo.claim_folder(dataclasses.replace(config, bend=0.5, fresh=True))
    assert not (tmp_path / "toy" / "seed_0").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(SystemExit, match="was not made by this script"):
        demo.claim_folder(demo.Config(out=str(tmp_path / "thesis"), fresh=True))
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_spearman_by_hand():
    """Breaks if ranks are not ranks, or ties do not share their mean: 1 - 6 sum d^2 / (n (n^2 -
    1)) without ties.
    """
    spearman = tables.spearman
    assert spearman([1, 2, 3, 4, 5], [1, 30, 20, 500, 40]) == pytest.approx(0.8)  # d = 0 1 1 1 1
    assert spearman([1, 2, 3, 4, 5], [1, 30, 20, 500, 4]) == pytest.approx(0.3)  # d = 0 2 0 1 3
    # ranks 1.5 1.5 3.5 3.5 and 1 2 3.5 3.5
    assert spearman([0, 0, 1, 1], [5, 6, 7, 7]) == pytest.approx(4 / 18**0.5)


@pytest.mark.slow
def test_the_whole_demo_in_small_twice(tmp_path):
    """Breaks if any stage does, or if a second run does not reuse the first, or if changed
    settings are mixed in.
    """
    out = tmp_path / "a toy with a space"
    sizes = ["--clips", "12", "--eval_clips", "3"]
    for steps in ("pretrain", "sft", "rl", "painter"):
        sizes += [f"--{steps}_steps", "2"]

    def run(module, *flags, timeout=600):
        command = [sys.executable, "-m", module, "--out", str(out), *sizes, *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)

    first = run("toy")
    assert first.returncode == 0, first.stderr[-3000:]
    table = json.loads((out / "table.json").read_text())
    assert set(table["results"][0]) == {"base", "text", "latent", "la-dapo"}
    assert set(table["ablations"][0]) == {"generated", *demo_plan.ABLATIONS}
    assert all(r[g]["n"] == 3 for r in table["results"][0].values() for g in demo.GROUPS)
    assert "able" in table["curation"][0] and "rows in each set" in table["figures"][0]
    assert {"imagined 1", "true frames, held out"} >= set(table["errors"][0])
    assert "| text-only SFT |" in first.stdout
    assert "10 of 10 stages done" in first.stderr and "it/s" not in first.stdout
    assert (out / "table.md").read_text() in first.stdout + "\n"
    trained = ("seed_0/latent/loss.png", "seed_0/la-dapo/rewards.png")
    drawn = ("seed_0/pictures/imagined.png", "seed_0/pictures/imagine.gif")
    for picture in ("accuracy.png", "clip.png", "rl.png", *trained, *drawn):
        assert (out / picture).stat().st_size > 5000
    model = out / "seed_0" / "latent" / "step_000002" / "model.safetensors"
    stamp = model.stat().st_mtime_ns

    second = run("toy", timeout=300)
    assert second.returncode == 0, second.stderr[-3000:]
    assert model.stat().st_mtime_ns == stamp
    assert json.loads((out / "table.json").read_text()) == table

    # one stage after the other: the same weights, the same numbers
    serial = run("toy", "--serial", "--out", str(tmp_path / "serial"))
    assert serial.returncode == 0, serial.stderr[-3000:]
    again = json.loads((tmp_path / "serial" / "table.json").read_text())
    assert {k: v for k, v in again.items() if k != "settings"} == {
        k: v for k, v in table.items() if k != "settings"
    }
    for name in ("base", "text", "latent", "la-dapo"):
        weights = f"seed_0/{name}/step_000002/model.safetensors"
        assert (tmp_path / "serial" / weights).read_bytes() == (out / weights).read_bytes()

    other = run("toy", "--bend", "0.5", timeout=100)
    assert other.returncode != 0 and "--fresh" in other.stderr

    # the tables go on in the same folder, with variants
    rows = "text,pause,latent,latent+self,la-dapo"
    more = run("toy.tables", "--seeds", "1", "--rows", rows)
    assert more.returncode == 0, more.stderr[-3000:]
    assert model.stat().st_mtime_ns == stamp
    tables_json = json.loads((out / "table.json").read_text())
    results, before = tables_json["results"][0], table["results"][0]
    assert {name: results[name] for name in before} == before
    assert set(results) - set(before) == {"pause", "latent+self"}
    assert "rank correlation of the two scores" in tables_json["figures"][0]
