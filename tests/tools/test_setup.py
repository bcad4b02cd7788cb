"""How `make` sets up the environment. Nothing is installed here."""

import os
import re
import subprocess

from tests.conftest import ROOT


def commands(*arguments):
    """What make would run to set up .venv, a command a line."""
    command = ["make", "--dry-run", "--always-make", ".venv/ready", *arguments]
    # the tests may run within make: what it tells its children is not for this one
    outer = ("TORCH_INDEX", "MAKELEVEL", "MAKEFLAGS", "MFLAGS")
    env = {k: v for k, v in os.environ.items() if k not in outer}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_torch_comes_from_its_own_index_where_one_is_named():
    """Breaks if make asks an index that nobody named, or another torch than the pinned one."""
    plain, named = commands(), commands("TORCH_INDEX=https://host/cpu")
    assert not any("index" in line or "http" in line for line in plain)
    (torch,) = [line for line in named if line not in plain]
    with open(os.path.join(ROOT, "requirements.txt"), encoding="utf-8") as f:
        pin = re.search(r"^torch==\S+", f.read(), re.M).group()
    assert torch.endswith(f"--no-deps --index-url https://host/cpu {pin}")
    assert named.index(torch) < named.index(plain[1]) and plain[1].endswith("-r requirements.txt")


def test_every_pin_is_exact():
    """Breaks if a requirement may be another version tomorrow."""
    with open(os.path.join(ROOT, "requirements.txt"), encoding="utf-8") as f:
        lines = [line.split("#")[0].strip() for line in f]  # a comment installs nothing
    pins = [line.split(";")[0].strip() for line in lines if line]
    assert len(pins) > 10 and all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)
