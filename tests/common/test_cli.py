"""The command line: what flags give, where values come from, and how errors are printed."""

import dataclasses
import glob
import json
import os
import runpy
import sys

import pytest

import evaluate
import la_dapo
import sft
from common.cli import parse_config, run_script
from common.folder import SETTINGS
from tests.conftest import ROOT, changed_rows


@dataclasses.dataclass
class Flags:
    steps: int = 3
    lr: float = 1e-5
    out: str = "runs"
    resume: bool = False
    spans: bool = True
    max_tokens: int = 5
    a_url: str = ""


def test_parse_config():
    """type=bool would read "--spans False" as True; an untyped number stays text; a misspelt flag
    is ignored; one with hyphens is refused, or a value with hyphens is changed.
    """
    argv = "--steps 7 --lr 1 --out 5 --resume --no-spans --max-tokens 9 --a-url=--no-a-b".split()
    found = parse_config(Flags, argv)
    assert found == Flags(7, 1.0, "5", True, False, 9, "--no-a-b")
    assert parse_config(Flags, []) == Flags()
    assert [type(v) for v in dataclasses.astuple(found)][:5] == [int, float, str, bool, bool]
    for wrong in ("--step_count 3", "--steps 1.5", "--spans False", "--lr fast", "steps"):
        with pytest.raises(SystemExit):
            parse_config(Flags, wrong.split())


def test_help_shows_the_comments(capsys):
    """Breaks if --help no longer says what a field is and where its value comes from."""
    with pytest.raises(SystemExit):
        parse_config(sft.Config, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "weight of the latent term, Eq. (1) (paper Table 8) (default: 0.1)" in said
    assert "frames sampled from a clip" in said and "share of the steps, linear" in said
    assert "#" not in said


def folder_with(tmp_path, **about):
    """A model's folder that records what the model was trained with -> its path."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / SETTINGS).write_text(json.dumps(about))
    return str(tmp_path / "m")


def test_precedence(tmp_path, capsys):
    """Breaks if one of flag, --config, protocol, folder and dataclass overrides an earlier one, or
    an override is silent.
    """
    about = dict(system="watch", l_max=3, max_latents=5, num_frames=7, image_max_tokens=9, lr=1)
    model = folder_with(tmp_path, **about, video_max_tokens=11)
    config = parse_config(evaluate.Config, ["--model", model])
    assert (config.system, config.l_max, config.max_latents) == ("watch", 3, 5)
    assert (config.num_frames, config.image_max_tokens, config.video_max_tokens) == (7, 9, 11)
    assert config.max_new_tokens == 2048 and capsys.readouterr().err == ""

    config = parse_config(evaluate.Config, ["--model", model, "--benchmark", "futurebench"])
    assert (config.num_frames, config.video_max_tokens, config.l_max) == (32, 12288, 3)
    assert "num_frames is 32, the model was trained with 7" in capsys.readouterr().err

    saved = tmp_path / "settings.json"
    saved.write_text(json.dumps(dict(model=model, l_max=2, num_frames=20, weights="12", limit=4)))
    for path in (saved, tmp_path):
        argv = ["--config", str(path), "--benchmark", "futurebench", "--num-frames", "8"]
        config = parse_config(evaluate.Config, argv)
        assert (config.model, config.limit, config.l_max, config.num_frames) == (model, 4, 2, 8)
        assert config.video_max_tokens == 12288 and config.image_max_tokens == 9
    assert "l_max is 2, the model was trained with 3" in capsys.readouterr().err

    assert parse_config(sft.Config, ["--model", model]).lr == 1e-5  # what is not shared stays
    assert parse_config(la_dapo.Config, ["--model", model]).max_latents == 5
    assert parse_config(evaluate.Config, []).l_max == 4


def test_saved_values_that_do_not_fit(tmp_path):
    """Breaks if a misspelt or mistyped value of a file is taken in silence."""
    faults = {"{": "not JSON", '{"lambda": 1}': "this script has no flag lambda"}
    faults['{"steps": "many"}'] = "steps should be int, found 'many'"
    for content, message in faults.items():
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(SystemExit, match=message):
            parse_config(sft.Config, ["--config", str(tmp_path / "c.json")])


def scripts():
    """{"tools.export": what stands below its `if __name__ == "__main__":`, ...}."""
    found = {}
    for part in ("*.py", "common/*.py", "toy/*.py", "tools/*.py", "variants/*.py"):
        for path in glob.glob(os.path.join(ROOT, part)):
            with open(path, encoding="utf-8") as f:
                _, main, end = f.read().partition('\nif __name__ == "__main__":')
            if main:
                name = os.path.relpath(path, ROOT)[:-3].replace(os.sep, ".")
                found[name.removesuffix(".__main__")] = end
    found.pop("common.clips", None)  # a process that decodes clips for the scripts
    return found


SCRIPTS = scripts()
# {script: (flags, what the error says)}; there is nothing at ./nowhere. A script that is not named
# here takes --data, --model and --out.
WRONG = {
    "tools.rehearse": ("--shape 9b", "9b"),
    "tools.bench": ("--shape 9b", "9b"),
    "tools.shapes": ("--shape 9b", "9b"),
    "sample": ("--model ./nowhere --question q --video ./nowhere", "./nowhere: no such"),
    "tools.clips": ("--data ./nowhere.json", "./nowhere.json: No such file"),
    "tools.export": ("./nowhere --out x", "./nowhere: no such folder"),
    "common.judge": ("./nowhere --model m", "./nowhere/settings.json: No such file"),
    "common.report": ("./nowhere", "./nowhere"),
    "common.painter": ("--model ./nowhere --data ./nowhere", "./nowhere"),
    "toy.world": ("--clips x", "argument --clips: invalid int value: 'x'"),
    "toy.tiny": ("--data ./nowhere --out x", "./nowhere"),
    "toy.table": ("./nowhere", "nowhere: no evaluation"),
    "tools.pictures": ("--model ./nowhere --data ./nowhere", "./nowhere"),
}


def run(script, monkeypatch, capsys, *argv):
    """A script as the command line runs it -> its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    return end.value.code, *capsys.readouterr()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_an_error_is_one_line_and_code_2(script, world, tmp_path, monkeypatch, capsys):
    """Breaks if a script does not end with run_script, or if a flag, a file or a model that is not
    there ends it in a traceback or in a line that does not say what is wrong.
    """
    assert "run_script(" in SCRIPTS[script] or "errors_in_one_line(" in SCRIPTS[script]
    monkeypatch.chdir(tmp_path)
    argv, message = WRONG.get(script, ("--data ./nowhere", "./nowhere: No such file"))
    faults = [(argv.split(), message)]
    if script not in ("common.report", "toy.table"):
        positional = ["./nowhere"] if script in ("common.judge", "tools.export") else []
        faults.append(([*positional, "--debut"], "arguments: --debut: did you mean --debug?"))
    if script not in WRONG:
        rows, empty = dict(data=world["test"]), dict(answer="")
        damaged = changed_rows(rows, "no.jsonl", lambda i, row: i < 3 and row.update(empty))
        faults.append((["--data", damaged], "3 of 8 records"))
        data = ["--data", world["test"], "--out", "out"]
        faults.append(([*data, "--model", "/nowhere"], "/nowhere: no such folder"))
        faults.append(([*data, "--model", str(tmp_path)], "no model in this folder"))
    for argv, message in faults:
        code, _, err = run(script, monkeypatch, capsys, *argv)
        lines = [line for line in err.splitlines() if "is out of date" not in line]
        text = code if isinstance(code, str) else lines[-1]
        assert code == 2 and message in text and len(lines) == 1, (argv, err)


def test_debug_shows_where(tmp_path, monkeypatch):
    """Breaks if --debug is taken for a value, or the traceback cannot be had."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--data", str(tmp_path / "gone"), "--debug"])
    with pytest.raises(FileNotFoundError):
        runpy.run_module("sft", run_name="__main__", alter_sys=True)


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    """Breaks if an error from inside a library, which its user cannot mend, loses its place."""

    @dataclasses.dataclass
    class Config:
        n: int = 1

    def library(config):
        json.loads("{")

    def user(config):
        raise ValueError("n is 1,\n   expected 2")

    with pytest.raises(json.JSONDecodeError):
        run_script(library, Config, [])
    with pytest.raises(SystemExit) as end:
        run_script(user, Config, [])
    assert end.value.code == 2 and capsys.readouterr().err == "n is 1, expected 2\n"
