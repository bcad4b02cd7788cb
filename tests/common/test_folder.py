"""A model's folder: what a training leaves there, and what scripts take from it."""

import dataclasses
import filecmp
import json
import os
import shutil

import pytest
import torch
from test_sft import settings

import sft
from common.folder import SETTINGS, is_hub_id, newest, trained_with
from common.run import read_lines
from tests.conftest import TINY_DATA


@pytest.fixture(scope="module")
def released(world, tmp_path_factory):
    """The world's model in a folder with a chat template and larger pictures, as released ones."""
    folder = tmp_path_factory.mktemp("released") / "model"
    shutil.copytree(world["model"], folder)
    images = dict(size=dict(shortest_edge=65536, longest_edge=16777216))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template=template)))
    return str(folder)


@pytest.fixture(scope="module")
def trained(world, released, tmp_path_factory):
    """Two steps of SFT from there, as a run's folder."""
    out = tmp_path_factory.mktemp("trained") / "sft"
    sft.train(settings(world, out, model=released, steps=2, save_every=1))
    return str(out)


def test_a_saved_folder_serves_others(world, released, trained):
    """Breaks if a file that others need is lost on the way, in the first checkpoint or a later one,
    or the trainer's state lies among them.
    """
    for step in ("step_000001", "step_000002"):
        folder = os.path.join(trained, step)
        names = set(os.listdir(folder))
        assert {"preprocessor_config.json", "video_preprocessor_config.json"} <= names
        assert {"chat_template.json", SETTINGS, "config.json", "tokenizer.json"} <= names
        assert [n for n in names if n.endswith(".pt")] == [] and "trainer" in names
        name = "chat_template.json"
        assert filecmp.cmp(os.path.join(released, name), os.path.join(folder, name), shallow=False)
        with open(os.path.join(folder, "preprocessor_config.json")) as f:  # trained so, not as base
            assert json.load(f)["size"]["longest_edge"] == TINY_DATA["image_max_tokens"] * 1024


def test_what_it_was_trained_with(world, trained):
    """Breaks if a later user cannot know how the model has to be asked, or what it learnt from."""
    about = trained_with(trained)
    given = {k: v for k, v in TINY_DATA.items() if k != "max_length"}
    assert given.items() <= about.items()
    assert about["num_frames"] == 16 and about["max_latents"] == 2 * TINY_DATA["l_max"]
    assert about["base"] == "model"
    (training,) = about["trainings"]
    assert training["name"] == "latent" and training["step"] == 2
    assert training["data"] == os.path.basename(world["data"]) and len(training["rows"]) == 64
    assert training["figures"]["ce"] == read_lines(os.path.join(trained, "log.jsonl"))[-1]["ce"]


def test_each_training_is_remembered_once(world, trained, tmp_path):
    """Breaks if a second training forgets the first, or a resumed run counts as two."""
    config = settings(world, tmp_path, model=trained, spans=False, steps=1, save_every=1)
    sft.train(config)
    sft.train(dataclasses.replace(config, resume=True))
    state = os.path.join(tmp_path, "step_000001", "trainer", "trainer.pt")
    kept = torch.load(state, weights_only=True)  # one more step of the same run
    kept["config"]["steps"] = 2
    torch.save(kept, state)
    sft.train(dataclasses.replace(config, resume=True, steps=2))
    about = trained_with(str(tmp_path))
    shutil.rmtree(tmp_path / "step_000002" / "trainer")
    with pytest.raises(SystemExit, match="cannot be continued: it has no trainer/trainer.pt"):
        sft.train(dataclasses.replace(config, resume=True, steps=2))
    assert [t["name"] for t in about["trainings"]] == ["latent", "text"]
    assert [t["step"] for t in about["trainings"]] == [2, 2] and about["base"] == "model"
    assert "preprocessor_config.json" in os.listdir(newest(str(tmp_path)))


# ------------------------------------------------------------------------------ what scripts take


def test_paths_and_hub_ids(tmp_path, monkeypatch):
    """Breaks if a mistyped path is looked for on the hub, or a hub id is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id("Qwen/Qwen3-VL-2B-Instruct")
    assert newest("Qwen/Qwen3-VL-2B-Instruct") == "Qwen/Qwen3-VL-2B-Instruct"
    for path in ("runs/sft", "./a", "here/model"):
        assert not is_hub_id(path)
        with pytest.raises(SystemExit, match="no such folder"):
            newest(path)
