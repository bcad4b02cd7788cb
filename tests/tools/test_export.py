"""A folder to give away."""

import filecmp
import os

import pytest
import torch
from safetensors.torch import load_file
from test_sft import settings

import evaluate
import sft
from common.folder import trained_with
from common.painter import Painter
from tests.conftest import TINY_DATA
from tools import export


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "sft"
    sft.train(settings(world, out, steps=1))
    return str(out)


def test_round_trip(world, run, tmp_path, capsys):
    """Breaks if weights, settings or the painter are lost, trainer state goes along, or
    the card leaves out what the model was made from.
    """
    shared = dict(data=world["test"], max_new_tokens=6, workers=0, **TINY_DATA)
    scores = evaluate.evaluate(evaluate.Config(model=run, out=str(tmp_path / "eval"), **shared))
    out = str(tmp_path / "given")
    config = export.Config(run, out, licence="apache-2.0", base="Qwen/Qwen3-VL-2B-Instruct")
    config.evals = str(tmp_path / "eval")
    Painter(96).save(os.path.join(run, "step_000001"))
    export.export(config)
    source = os.path.join(run, "step_000001")
    assert "given: made from" in capsys.readouterr().out
    assert trained_with(out) == trained_with(source) and "trainer" not in os.listdir(out)
    painter = os.path.join("painter", "painter.safetensors")
    assert filecmp.cmp(os.path.join(source, painter), os.path.join(out, painter), shallow=False)
    before, after = (load_file(os.path.join(f, "model.safetensors")) for f in (source, out))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[name].bfloat16())

    card = open(os.path.join(out, "README.md")).read()
    for text in ("base_model: Qwen/Qwen3-VL-2B-Instruct\n", "license: apache-2.0\n", "# given\n"):
        assert text in card
    accuracy = f"accuracy {scores['all']['accuracy']:.4g}"
    assert "custom_generate=FOLDER, trust_remote_code=True" in card and accuracy in card
    assert f"| latent | {os.path.basename(world['data'])} | 1 | ce " in card
    assert trained_with(out)["trainings"][0]["commit"] in card


def test_the_card_of_a_variant():
    """Breaks if the card of a folder with other layers says that transformers runs it."""
    plain, other = (export.card({}, {}, export.Config(out="x"), by) for by in (None, "a/b.py"))
    assert "custom_generate=FOLDER" in plain and "a/b.py" not in plain
    assert "custom_generate=FOLDER" not in other and "a/b.py" in other


def test_what_cannot_be_exported(world, run, tmp_path):
    """Breaks if a folder that holds something is written over, or the first lines of an error are
    lost in a traceback.
    """
    with pytest.raises(SystemExit, match="--out is missing"):
        export.export(export.Config(run))
    with pytest.raises(SystemExit, match="is not empty: choose another"):
        export.export(export.Config(run, world["model"]))
    with pytest.raises(SystemExit, match="no model in this folder"):
        export.export(export.Config(str(tmp_path), str(tmp_path / "out")))


def test_a_folder_that_knows_nothing(world, tmp_path):
    """Breaks if a model that was not trained here cannot be exported."""
    export.export(export.Config(world["model"], str(tmp_path / "out")))
    card = open(tmp_path / "out" / "README.md").read()
    assert "Trainings: not recorded." in card and "Not stated." in card
    assert trained_with(str(tmp_path / "out")) == {}
