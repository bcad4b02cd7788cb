"""The lmms-eval plugin, against a stand-in of the interface that it subclasses."""

import importlib
import json
import os
import sys
import types
from typing import NamedTuple

import pytest
from PIL import Image
from scripted import play

from common.folder import SETTINGS
from tests.conftest import ROOT, frames

NAME = "future_l1_lmms_eval"


class Lmms:
    """The part of lmms_eval.api.model.lmms (0.7.2) that a model uses or has to have."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda attr, request, answer: None)

    @classmethod
    def create_from_arg_string(cls, arguments, more=None):
        return cls(**dict(pair.split("=") for pair in arguments.split(",")), **(more or {}))


class ModelManifest(NamedTuple):
    model_id: str
    simple_class_path: str


@pytest.fixture
def plugin(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", types.SimpleNamespace(lmms=Lmms))
    registry = types.SimpleNamespace(ModelManifest=ModelManifest)
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", registry)
    monkeypatch.setenv("FUTURE_L1", ROOT)
    monkeypatch.syspath_prepend(os.path.join(ROOT, "tools", "lmms_eval_plugin"))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def folder(scripted):
    folder, tokenizer = scripted
    about = dict(system="system", l_max=1, max_latents=2, num_frames=4, image_max_tokens=4)
    (folder / "model" / SETTINGS).write_text(json.dumps(dict(about, video_max_tokens=8)))
    return folder, tokenizer


def requests(model, folder, texts, visuals, **settings):
    """Requests as lmms-eval makes them, one a text."""
    docs = [dict(visual=visual) for visual in visuals]
    model.task_dict = {"videomme": {"test": docs}}
    out = []
    for i, text in enumerate(texts):
        arguments = text, settings, lambda doc: doc["visual"], i, "videomme", "test"
        out.append(types.SimpleNamespace(args=arguments))
    return out


def test_answers_of_a_task(plugin, folder, monkeypatch, capsys):
    """Breaks if answers come in another order than the requests, without the task's visual, or an
    unreadable clip ends the run.
    """
    folder, tokenizer = folder
    model = plugin.FutureL1.create_from_arg_string(
        f"pretrained={folder / 'model'},num_frames=2", dict(batch_size="2", device=None)
    )
    assert (model.config.num_frames, model.config.system, model.max_latents) == (2, "system", 2)
    script = dict(q0="<reason> one </reason> <answer> B </answer>", q1="<answer> A </answer>")
    script.update(q3="<reason> two </reason> </answer>", q4="<answer> C next </answer>")
    asked = play(monkeypatch, tokenizer, script, plugin)
    picture = Image.fromarray(frames(1, 64, 64)[0])
    visuals = [[str(folder / "0.mp4")], [picture], [str(folder / "gone.mp4")], None, [picture] * 2]
    texts = ["what next ? q0", "<image> what ? q1", "what ? q2", "q3", "q4"]
    settings = dict(max_new_tokens=16, temperature=0, until=["\n\n", "next"])
    answers = model.generate_until(requests(model, folder, texts, visuals, **settings))
    assert answers == ["B", "A", "", "two", "C"]
    assert "skipped videomme:test:2:" in capsys.readouterr().out
    assert "gone.mp4: no such file" not in str(answers)

    shapes = []
    for _, batch, settings in asked:
        assert settings["max_new_tokens"] == 2048 and settings["max_latents"] == 2
        assert settings["temperature"] == 0.0 and settings["top_p"] == 1.0
        videos = len(batch.get("video_grid_thw", []))
        shapes.append((len(batch["input_ids"]), videos, len(batch.get("image_grid_thw", []))))
    assert shapes == [(2, 1, 1), (1, 0, 0), (1, 0, 2)]


def test_the_model_itself_answers(plugin, folder):
    """Breaks if the real decoder takes other arguments than the plugin gives."""
    folder, _ = folder
    model = plugin.FutureL1(str(folder / "model"), max_new_tokens=5)
    some = requests(model, folder, ["what next ? q0"], [[str(folder / "0.mp4")]], until="\n\n")
    (answer,) = model.generate_until(some)
    assert isinstance(answer, str)
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError):
            getattr(model, name)([])


def test_what_is_registered(plugin, folder):
    """Breaks if the entry point names another class than there is, or a bad argument is taken."""
    entry = open(os.path.join(ROOT, "tools", "lmms_eval_plugin", "pyproject.toml")).read()
    assert 'future_l1 = "future_l1_lmms_eval:manifest"' in entry
    manifest = plugin.manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert module == NAME and getattr(plugin, name).is_simple and manifest.model_id == "future_l1"
    with pytest.raises(ValueError, match="model_args: fps is unknown"):
        plugin.FutureL1(str(folder[0] / "model"), fps=2)


def test_the_checkout_is_found_or_said(plugin, monkeypatch):
    """Breaks if a wrong FUTURE_L1 is taken, or hides another package called evaluate."""
    assert ROOT in sys.path
    monkeypatch.setenv("FUTURE_L1", "/nowhere")
    with pytest.raises(SystemExit, match="FUTURE_L1 is '/nowhere', expected the folder"):
        plugin.find_checkout()
