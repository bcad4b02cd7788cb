"""The shell scripts of the embedded world, in small: killed, continued, and told apart."""

import os
import signal
import subprocess
import sys
import time

import pytest

from common.folder import newest

SIZES = dict(CLIPS="24", ANNOTATED="12", EVAL_CLIPS="3")
SIZES |= {f"{name}_STEPS": "3" for name in ("PRETRAIN", "SFT", "RL", "PAINTER")}
SIZES |= dict(PRETRAIN_STEPS="30")  # enough to give the answers that curation chooses by


def start(script, *arguments, **more):
    """A script of the repository with these arguments and sizes -> its process."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    env = {**os.environ, **SIZES, "PATH": path, **more}
    return subprocess.Popen(["bash", script, *map(str, arguments)], env=env, **pipe)


def run(script, *arguments, **more):
    """The same to its end -> exit code, what it said."""
    process = start(script, *arguments, **more)
    said, _ = process.communicate(timeout=1800)
    return process.returncode, said


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo in small, killed in its middle and continued -> its folder, what it said at last."""
    out = tmp_path_factory.mktemp("demo") / "a toy with a space"
    process = start("toy/demo.sh", out)
    log, began = out / "seed_0" / "logs" / "latent.txt.part", time.time()
    while not log.exists() and time.time() - began < 600:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "\nbase: " in said and "\nlatent: " not in said
    time.sleep(1)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(out) not in listed  # nothing runs on
    base = os.path.getmtime(newest(str(out / "seed_0" / "base")) + "/model.safetensors")

    code, said = run("toy/demo.sh", out)
    assert code == 0, said[-3000:]
    assert "\nbase: " not in said and "\nlatent: " in said
    assert os.path.getmtime(newest(str(out / "seed_0" / "base")) + "/model.safetensors") == base
    return out, said


@pytest.mark.slow
def test_the_demo_killed_and_continued(demo, tmp_path):
    """Breaks if a stage does, if one that is done is done again, if a killed script leaves a
    process or a half result behind, or if what comes is not what an unbroken run gives.
    """
    out, said = demo
    for row in ("base (captions only)", "text-only SFT", "latent SFT", "shuffled", "before"):
        assert f"\n| {row} | " in said
    assert "\n| RL: LA-DAPO | " in said
    assert "- share of hops, random: " in said and "true frames, held out" in said
    assert (out / "table.md").read_text() in said
    trained = ("seed_0/latent/loss.png", "seed_0/la-dapo/rewards.png", "data/clip.png")
    for picture in ("accuracy.png", "rl.png", "seed_0/pictures/imagined.png", *trained):
        assert (out / picture).stat().st_size > 5000
    assert (out / "seed_0" / "eval_la-dapo" / "report.html").exists()

    code, again = run("toy/demo.sh", out)  # all is done: the table alone
    assert code == 0 and (out / "table.md").read_text() in again and "\nlatent: " not in again
    code, refused = run("toy/demo.sh", out, SFT_STEPS="4")
    assert code == 2 and "made with other numbers of steps" in refused

    code, whole = run("toy/demo.sh", tmp_path / "whole")
    assert code == 0, whole[-3000:]
    for name in ("base", "text", "latent", "la-dapo", "able", "chosen", "random"):
        one, other = (newest(str(o / "seed_0" / name)) for o in (out, tmp_path / "whole"))
        with open(f"{one}/model.safetensors", "rb") as a:
            with open(f"{other}/model.safetensors", "rb") as b:
                assert a.read() == b.read(), name


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_script(demo, tmp_path):
    """Breaks if a failure is not told by name with the end of its log, or the other stages, of
    which one takes minutes, run on.
    """
    script = tmp_path / "script.sh"
    script.write_text(
        "OUT=$1 SEED=0\nsource toy/stage.sh\n"
        "bad() { stage good echo fine; stage bad python -c 'int(\"one\")'; stage never true; }\n"
        "slow() { stage slow sleep 600; }\nat_once slow bad\necho end\n"
    )
    began = time.time()
    code, said = run(script, tmp_path / "out")
    assert code == 1 and time.time() - began < 60
    assert "good: " in said and "bad failed; the end of" in said and "invalid literal" in said
    assert "end\n" not in said.replace("the end of", "")
    logs = tmp_path / "out" / "seed_0" / "logs"
    assert (logs / "good.txt").exists() and (logs / "bad.txt.part").exists()
    assert not (logs / "bad.txt").exists() and not (logs / "never.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, sizes, rows",
    [
        ("toy/controls.sh", {}, ["twice the steps", "one term of its series", "own latents"]),
        ("variants/m2la.sh", dict(HEAL_STEPS="1", RANKS="24"), ["exact-24", "random-24-before"]),
        ("variants/video_latent.sh", dict(ANSWER_STEPS="1"), ["video_C+div-zero", "video_pause"]),
        ("variants/opd.sh", dict(OPD_STEPS="1"), ["teacher-told-cue", "opd-0-train-cue+module"]),
        (
            "variants/mcr.sh",
            dict(LOOP_STEPS="2", REWARD_STEPS="1", COSTS="0.05"),
            ["mcr-uniform-3", "mcr-loops-T1", "mcr-cost-0.05-T0"],
        ),
    ],
)
def test_a_variants_rows(script, sizes, rows, demo):
    """Breaks if a row of a table is not a command that runs, or its answers are in no table."""
    code, said = run(script, demo[0], **sizes)
    assert code == 0, said[-3000:]
    for row in rows:
        assert any(row in line for line in said.splitlines() if line.startswith("| ")), row


@pytest.mark.slow
def test_sets_in_small(tmp_path):
    """Breaks if an arm does not train, or is not decoded with its schedules."""
    code, said = run("variants/set_spans.sh", tmp_path / "sets")
    assert code == 0, said[-3000:]
    for arm in ("plain", "ar-ar", "frame-frame", "one-one", "random-1", "random-4"):
        assert f"\n| sets-{arm} | " in said
