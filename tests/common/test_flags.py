"""Flags: what they give, where values come from, and how errors are said."""

import dataclasses
import glob
import json
import os
import runpy
import sys

import pytest

import sft
from common.flags import parse_config

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclasses.dataclass
class Flags:
    steps: int = 3
    lr: float = 1e-5
    out: str = "runs"
    resume: bool = False
    spans: bool = True


def test_parse_config():
    """type=bool would read "--spans False" as True; an untyped number stays text; a misspelt flag
    is ignored.
    """
    found = parse_config(Flags, "--steps 7 --lr 1 --out 5 --resume --no-spans".split())
    assert found == Flags(7, 1.0, "5", True, False) and parse_config(Flags, []) == Flags()
    assert [type(v) for v in dataclasses.astuple(found)] == [int, float, str, bool, bool]
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


SCRIPTS = ["sft", "la_dapo", "curate", "evaluate", "sample", "tools.bench"]
SCRIPTS += ["common.judge", "common.report", "variants.logprob_gain", "variants.noisy_latents"]
SCRIPTS += ["tools.export", "tools.clips", "tools.pictures", "variants.own_path", "common.painter"]
SCRIPTS += ["variants.pause_tokens", "variants.self_forcing", "tools.plan"]
SCRIPTS += ["variants.m2la", "variants.video_latent", "variants.opd", "variants.set_spans"]
SCRIPTS += ["variants.mcr", "variants.mcr_sft", "toy.world", "toy.tiny", "toy.table"]
SCRIPTS += ["tools.shapes"]


def run(script, monkeypatch, capsys, *argv):
    """A script as the command line runs it -> its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    return end.value.code, *capsys.readouterr()


def damaged(world, folder):
    """The world's test rows, three of the eight without an answer -> their file."""
    with open(world["test"]) as f:
        records = [json.loads(line) for line in f]
    for record in records[:3]:
        record["answer"] = ""
    path = os.path.join(folder, "damaged.jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)
    return path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_error_is_one_line_and_code_2(script, world, tmp_path, monkeypatch, capsys):
    """Breaks if a flag, a file or a model that is not there ends a script in a traceback, or in a
    line that does not say what is wrong.
    """
    nowhere = str(tmp_path / "nowhere")
    wrong = {
        "toy.world": (["--clips", "x"], "argument --clips: invalid int value: 'x'"),
        "toy.tiny": (["--data", nowhere], f"{nowhere}: No such file"),
        "toy.table": ([nowhere], f"{nowhere}: no evaluation"),
        "tools.plan": (["--shape", "9b"], "9b"),
        "tools.bench": (["--cpu", "--n", "x"], "argument --n: invalid int value: 'x'"),
        "tools.shapes": (["--shape", "9b"], "9b"),
        "sample": (
            ["--model", nowhere, "--question", "q", "--video", nowhere],
            f"{nowhere}: no such",
        ),
        "tools.clips": (["--data", nowhere + ".json"], f"{nowhere}.json: No such file"),
        "tools.export": ([nowhere, "--out", "x"], f"{nowhere}: no such folder"),
        "common.judge": ([nowhere, "--model", "m"], f"{nowhere}/settings.json: no such file"),
        "common.report": ([nowhere], f"{nowhere}"),
        "common.painter": (["--model", nowhere, "--data", nowhere], f"{nowhere}"),
        "tools.pictures": (["--model", nowhere, "--data", nowhere], f"{nowhere}"),
    }
    argv, message = wrong.get(script, (["--data", nowhere], f"{nowhere}: No such file"))
    faults = [(argv, message)]
    if script not in ("common.report", "toy.table"):
        argv = [nowhere] if script in ("common.judge", "tools.export") else []
        faults.append(([*argv, "--debut"], "arguments: --debut: is --debug meant?"))
    if script not in wrong:
        faults.append((["--data", damaged(world, tmp_path)], "3 of 8 records"))
        data = ["--data", world["test"], "--out", str(tmp_path / "out")]
        faults.append(([*data, "--model", nowhere], f"{nowhere}: no such folder"))
        faults.append(([*data, "--model", str(tmp_path)], "no model in this folder"))
    for argv, message in faults:
        code, _, err = run(script, monkeypatch, capsys, *argv)
        lines = [line for line in err.splitlines() if "is out of date" not in line]
        text = code if isinstance(code, str) else lines[-1]
        assert code == 2 and message in text and len(lines) == 1, (argv, err)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_files_that_a_library_reads(tmp_path, monkeypatch, capsys):
    """Breaks if a file that is missing or damaged is said by pyarrow's traceback."""
    damaged, gone = tmp_path / "damaged.parquet", tmp_path / "gone.parquet"
    damaged.write_bytes(b"PAR1 and nothing else")
    for path, message in ((damaged, "not a parquet file"), (gone, "No such file")):
        code, _, err = run("sft", monkeypatch, capsys, "--data", str(path))
        assert code == 2 and f"{path}: {message}" in err and len(err.splitlines()) == 1


def test_every_script_is_among_them():
    """Breaks if a new script is not checked above, or ends without run_script."""
    found = {}
    for part in ("*.py", "common/*.py", "toy/*.py", "tools/*.py", "variants/*.py"):
        for path in glob.glob(os.path.join(ROOT, part)):
            with open(path, encoding="utf-8") as f:
                _, main, end = f.read().partition('\nif __name__ == "__main__":')
            if main:
                name = os.path.relpath(path, ROOT)[:-3].replace(os.sep, ".")
                found[name.removesuffix(".__main__")] = end
    del found["common.clips"]  # a process that scripts talk to
    assert set(SCRIPTS) == set(found)
    assert all("run_script(" in end or "errors_in_one_line(" in end for end in found.values())


def test_debug_shows_where(tmp_path, monkeypatch):
    """Breaks if --debug is taken for a value, or the traceback cannot be had."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--data", str(tmp_path / "gone"), "--debug"])
    with pytest.raises(FileNotFoundError):
        runpy.run_module("sft", run_name="__main__", alter_sys=True)


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    """Breaks if an error from inside a library, which its user cannot mend, loses its place."""
    from common.flags import run_script

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
