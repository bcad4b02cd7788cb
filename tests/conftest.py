"""What the tests share: a tiny random model with a real tokenizer, and real mp4 clips."""

import json
import os
import subprocess
import sys

# two cores: a thread each for two workers (who started them has read this file, too), else two
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
import torch

from common import clips
from data import DataConfig
from toy import tiny
from toy import world as paddle

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what the data flags of the toy's models are
TINY_DATA = {
    name: tiny.settings("sft")[name]
    for name in ("image_max_tokens", "l_max", "max_length", "system")
}
WORDS = (
    "system user assistant watch the ball which wall does it hit next ? "
    "moves right left up down hits red green blue"
)


def pytest_configure(config):
    """Hide the GPU from all tests but `-m cuda`: bf16 on CUDA meets neither the tolerances of fp32
    nor equality to the bit. Nothing has asked for a GPU yet.
    """
    if "cuda" not in config.option.markexpr:  # `make gpu`, `make gpus`
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer([WORDS])


@pytest.fixture
def model(tokenizer):
    """A fresh FutureL1 of half a million weights (fp32, eval), with an output layer loud enough
    to sample from.
    """
    model = tiny.make_model(tokenizer, seed=0).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.fixture(scope="session")
def data_config():
    return DataConfig(image_max_tokens=4, l_max=4, system="watch the ball", workers=0)


def frames(count, height, width, seed=0):
    """uint8 (T, H, W, 3): a gradient that moves, each frame recognisable by its brightness."""
    y, x = np.mgrid[:height, :width]
    tint = np.random.default_rng(seed).integers(0, 60, 3)
    gradient = [x * 90 / width, y * 90 / height, (x + y) * 45 / (width + height)]
    brighter = 100 * np.arange(count) / max(1, count - 1)  # (T,)
    pictures = np.stack(gradient, -1) + brighter[:, None, None, None] + tint  # (T, H, W, 3)
    return np.clip(pictures, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six clips of the paddle box with their 24 rows, and a tiny model folder: dict(model, data,
    folder).
    """
    folder = tmp_path_factory.mktemp("world")
    sizes = dict(clips=6, annotated=6, eval_clips=2, eval_seed=100)
    config = paddle.Config(out=str(folder / "data"), **sizes)
    paths = paddle.make_world(config)
    tokenizer = tiny.make_tokenizer(
        open(paths["captions"]).read().replace('"', " ").split()
        + open(paths["train"]).read().replace('"', " ").split()
    )
    tiny.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return dict(
        model=str(folder / "model"), data=paths["train"], test=paths["test"], folder=str(folder)
    )


def changed_rows(world, name, change, n=None):
    """A copy of the world's first n records, each after change(i, record) -> its path."""
    with open(world["data"]) as f:
        rows = [json.loads(line) for line in f][:n]
    for i, row in enumerate(rows):
        change(i, row)
    path = os.path.join(os.path.dirname(world["data"]), name)
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def flags(config, **more):
    """A config, some fields changed, as the command line has it."""
    argv = []
    for name, value in {**vars(config), **more}.items():
        is_bool = isinstance(value, bool)
        argv.append(f"--{'' if value else 'no-'}{name}" if is_bool else f"--{name}={value}")
    return argv


def run_python(arguments, processes=1):
    """Run python with these arguments, in one or several processes of its own -> what it said."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(ranks if processes > 1 else []), *map(str, arguments)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    how = dict(env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400)
    run = subprocess.run(command, cwd=ROOT, **how)
    assert run.returncode == 0, run.stdout[-6000:]
    return run.stdout


def launch(config, processes=1):
    """Run a config's script by its command line, in processes of its own -> what it said."""
    return run_python(["-m", type(config).__module__, *flags(config)], processes)


def flat(numbers, height=64, width=64):
    """Grey frames that tell their number (mod 40), 42 levels apart. `shown` reads it back."""
    return np.stack([np.full((height, width, 3), 8 + 6 * (7 * k % 40), np.uint8) for k in numbers])


def shown(pictures):
    levels = [round((float(np.asarray(p).mean()) - 8) / 6) for p in pictures]
    return [level * 23 % 40 for level in levels]  # 7 * 23 = 1 (mod 40)


@pytest.fixture
def film(tmp_path):
    def make(name="film.mp4", numbers=range(40), height=64, width=64, fps=12):
        paddle.write_mp4(str(tmp_path / name), flat(numbers, height, width), fps)
        return str(tmp_path / name)

    return make


@pytest.fixture
def stand_in_decord(tmp_path, monkeypatch):
    """stand_in_decord(text): the process that reads clips imports this module as decord."""

    def make(text):
        folder = tmp_path / "stand_in"
        folder.mkdir()
        (folder / "decord.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setattr(clips, "_decoders", {})  # a process begun here, not one that is there

    return make


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A folder with clips, a model that takes words and an answer for each word q0, q1 ... in a
    question.
    """
    folder = tmp_path_factory.mktemp("bench")
    words = "system user assistant A B C D ) what next ? one two it is seconds"
    words += " <answer> </answer> <reason> </reason>"
    tokenizer = tiny.make_tokenizer([words, " ".join(f"q{i}" for i in range(9))])
    tiny.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for i in range(3):
        paddle.write_mp4(str(folder / f"{i}.mp4"), frames(12, 64, 64, seed=i), fps=10)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder, tokenizer
