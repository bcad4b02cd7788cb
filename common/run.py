"""A training's folder: settings, log and checkpoints, and how a run is resumed from them.

OUT/settings.json           the config of the run
OUT/log.jsonl               a line for each step
OUT/step_N                  a model's folder, see common/folder.py; the last two are kept
    trainer/trainer.pt      the step, and the optimizer's state by the names of the weights, in
                            whole tensors, so that another number of ranks can continue
    trainer/rank_R.pt       the random state of rank R
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from common.ahead import read_ahead
from common.folder import checkpoints, complete, describe_training, model_fingerprint, newest
from common.formats import read_rows, report_bad
from common.lora import adapters, add_adapters, merged, put_adapters
from common.machine import part_of, whole, whole_weights
from data import Samples

# fields that may differ between a run and its continuation
HARMLESS = {"resume", "out", "workers", "max_bad", "save_every", "track", "eval_data", "judge_url"}
HARMLESS |= {"gradient_checkpointing", "micro_batch", "shard", "cuda_graph"}
TRACKERS = ("wandb", "trackio")  # both packages have init, log and finish


# ------------------------------------------------------------------------------------------- files


def write(path, text):
    """Write a file under a temporary name, then rename it: it is whole, or not there."""
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".part", path)


def write_json(path, content):
    """Write a JSON file as `write` does."""
    write(path, json.dumps(content, indent=1, ensure_ascii=False))


def read_lines(path):
    """A .jsonl file -> its lines as dicts. A half-written last line, of a killed run, is cut off.

    Raises ValueError if a line is not JSON.
    """
    with open(path, "rb") as f:
        text = f.read()
    complete_lines = text[: text.rfind(b"\n") + 1]
    if complete_lines != text:
        os.truncate(path, len(complete_lines))
    try:
        return [json.loads(line) for line in complete_lines.decode("utf-8").split("\n")[:-1]]
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not a results file ({e})") from e


def trim_log(path, first):
    """Drop the lines from step `first` on, because these steps are about to be done again."""
    lines = read_lines(path) if os.path.exists(path) else []
    write(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] < first))


def lock(folder):
    """Lock a folder for this process -> the open lock file, which has to be kept.

    The kernel releases the lock when the process ends, even after kill -9. Raises SystemExit if
    another process holds it.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # systems differ in which one it is
        raise SystemExit(f"{folder}: another process is running in this folder") from e
    return file


# --------------------------------------------------------------------------------------------- rows


def need_data(config):
    """Raises SystemExit if no data file is named."""
    if not config.data:
        raise SystemExit(
            "--data is missing: a .json, .jsonl or .parquet file of records (see common/formats.py)"
        )


def rows_of(config, path=None):
    """The rows of config.data, or of another file. Bad records are reported and left out.

    Raises SystemExit if no file is named or too many records are bad, RecordError if the file has
    no records.
    """
    need_data(config)
    bad = []
    rows = read_rows(path or config.data, config.media_root or None, bad)
    report_bad(bad, len(rows) + len(bad), config.max_bad)
    return rows


def held_out_rows(config):
    """The rows of config.eval_data, the held-out set; [] without a file."""
    return rows_of(config, config.eval_data) if config.eval_data else []


def in_order(rows, tokenizer, size, config, machine, **encoding):
    """Yields this rank's part of the rows in their order, encoded: lists of `size` samples.

    The lists do not depend on the number of ranks. Each rank gets the same number of them, of which
    the last may be empty, so that a forward that needs all ranks does not hang. encoding:
    arguments of `encode`.
    """
    plan = [list(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]
    plan += [[]] * (-len(plan) % machine.world)
    samples = Samples(rows, tokenizer, config, **encoding)
    yield from read_ahead(samples, machine.my_part(plan), config.workers)


@contextlib.contextmanager
def aside(model):
    """Measure without an effect on the training: no gradients, and the random state is restored."""
    state, training = random_state(), model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        set_random_state(state)


def fingerprint(rows):
    """A hash of the rows that a run is trained on: all their fields that reach the model.

    A frame counts by its path and index, or by its bytes; what a variant adds to its rows, too.
    """
    digest = hashlib.sha256()
    for row in rows:
        parts = {k: v for k, v in vars(row).items() if k not in ("where", "group")}
        digest.update(repr(parts).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- the run


class Run:
    """A training's folder: the lock, the checkpoints, the log.

    name: a word for what is trained; a run only resumes a run of the same name. checkpoint, state:
    the newest checkpoint in the folder and its trainer.pt, or None. first: the first step that is
    still to do.
    Raises SystemExit if another process runs in the folder, if it holds a checkpoint and `resume`
    is off, or if that checkpoint was made with other rows, other values or by another script.
    """

    def __init__(self, config, rows, machine, name):
        self.config, self.machine, self.name = config, machine, name
        self.lock = lock(config.out) if machine.master else None
        machine.wait()
        self.rows = fingerprint(rows)
        self.checkpoint = (checkpoints(config.out) or [None])[-1]
        self.state = self._read_state() if self.checkpoint else None
        self.first = self.state["step"] if self.state else 0
        self.origin, self.shown, self.tracker, self.routers = None, {}, None, []
        self.path = os.path.join(config.out, "log.jsonl")

    def _read_state(self):
        config = self.config
        if not config.resume:
            raise SystemExit(
                f"{config.out} already holds {os.path.basename(self.checkpoint)}: pass "
                "--resume to continue it, or another --out"
            )
        path = os.path.join(self.checkpoint, "trainer", "trainer.pt")
        if not os.path.exists(path):
            raise SystemExit(f"{self.checkpoint} cannot be continued: it has no trainer/trainer.pt")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if state["rows"] != self.rows:
            raise SystemExit(
                f"{self.checkpoint} was trained on other rows than those of {config.data}"
            )
        before, now = state["config"], dataclasses.asdict(config)
        names = (before.keys() | now.keys()) - HARMLESS  # a field that only one has differs too
        changed = [k for k in names if (k in before, before.get(k)) != (k in now, now.get(k))]
        if changed:
            more = "steps" in changed or "epochs" in changed
            raise SystemExit(
                f"{self.checkpoint} was made with other values of {', '.join(sorted(changed))}"
                + f"; to train it further, start another --out from --model {config.out}" * more
            )
        if state["name"] != self.name:
            raise SystemExit(f"{self.checkpoint} trained {state['name']!r}, not {self.name!r}")
        return state

    def start_folder(self, other=""):
        """The folder or hub id that the run began with, for runs that need it to the end.

        other: a model to use instead of config.model. Raises SystemExit if a resumed run finds
        other weights there.
        """
        if self.state:
            folder = self.state["origin"]["folder"]
        else:
            folder = newest(other or self.config.model)
        self.origin = dict(folder=folder, weights=model_fingerprint(folder))
        if self.state and self.state["origin"] != self.origin:
            raise SystemExit(
                f"{self.checkpoint} needs {folder}, where the run began and which holds other "
                "weights now"
            )
        return folder

    def load(self, **options):
        """The model in fp32, from the newest checkpoint or the start -> (model, tokenizer).

        With lora_rank it is the model that the run began with, with adapters beside it. options:
        those of `Machine.load`.
        """
        config = self.config
        if config.lora_rank:
            model, tokenizer = self.machine.load(self.start_folder(), frozen=True, **options)
            add_adapters(model, config.lora_rank).train()
            if self.state:
                put_adapters(model, self.state["adapters"])
        else:
            folder = self.checkpoint or newest(config.model)
            model, tokenizer = self.machine.load(folder, train=True, **options)
        if config.gradient_checkpointing:
            arguments = dict(use_reentrant=False)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        self.routers = count_tokens(model, self.machine.device)
        return model, tokenizer

    def start(self, model, optimizer, text):
        """Restore optimizer and random state from the checkpoint, open the log, print `text`."""
        config = self.config
        if self.state:
            restore(model, optimizer, self.checkpoint, self.state, self.machine.rank)
        if not self.machine.master:
            return
        write_json(os.path.join(config.out, "settings.json"), dataclasses.asdict(config))
        of_rollouts = glob.glob(os.path.join(glob.escape(config.out), "rollouts_*.jsonl"))
        for path in (self.path, *of_rollouts):  # a line of each has its step
            trim_log(path, self.first)
        if config.resume and not self.first:
            print(f"nothing to resume in {config.out}: starting at step 0")
        if config.track:
            self.tracker = start_tracker(config)
        print(text)

    def steps(self, steps):
        """The numbers of the steps that are still to do, with a progress bar."""
        todo, hidden = range(self.first, steps), not self.machine.master
        self.bar = tqdm(
            todo, initial=self.first, total=steps, desc=self.name, disable=hidden, mininterval=2
        )
        return self.bar

    def skips(self, skipped, judge=None):
        """Name the samples this rank skipped -> those of all ranks, and the judge's failures."""
        for where, why in skipped:
            tqdm.write(f"skipped {where}: {why}")
        failures = Counter(judge.failures) if judge else Counter()
        if judge:
            judge.failures.clear()
        all_skipped, all_failures = [], Counter()
        for some, failed in self.machine.gather([(skipped, failures)]):
            all_skipped += [list(skip) for skip in some]
            all_failures += failed
        return all_skipped, dict(all_failures)

    def log(self, line, *shown):
        """Write a step's line; the fields named in `shown` also go beside the progress bar.

        All ranks call this together: of a mixture of experts the line gets `largest_expert`.
        """
        line.update(largest_expert(self.routers, self.machine))
        self.shown = {name: line[name] for name in shown if line.get(name) is not None}
        if not self.machine.master:
            return
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        self.bar.set_postfix(
            {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in self.shown.items()}
        )
        if self.tracker:
            self.tracker.log(line, step=line["step"])

    def say(self, text):
        """Print above the progress bar, on the first rank."""
        if self.machine.master:
            tqdm.write(text)

    def due(self, done, steps):
        """Whether a checkpoint is written after `done` of `steps` steps."""
        return done % self.config.save_every == 0 or done == steps

    def save(self, done, model, tokenizer, optimizer, **state):
        """Write a checkpoint under a temporary name, then rename it; keep the last two.

        All ranks call this together. state: values that a resumed run finds in `Run.state`.
        """
        config, machine, before = self.config, self.machine, self.checkpoint
        self.checkpoint = os.path.join(config.out, f"step_{done:06d}")
        partial = os.path.join(config.out, f".partial_step_{done:06d}")
        state.update(step=done, name=self.name, config=dataclasses.asdict(config))
        state.update(world=machine.world, rows=self.rows, origin=self.origin)
        if config.lora_rank:
            state.update(adapters={name: p.detach() for name, p in adapters(model).items()})
        weights = whole_weights(model, keep=machine.master)
        state.update(optimizer=optimizer_state(model, optimizer, machine.master))

        # the first rank makes the folder, then each adds its own random state
        if machine.master:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(os.path.join(partial, "trainer"))
            if config.lora_rank:
                weights = merged(model, weights)
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            facts = dict(name=self.name, step=done, rows=self.rows, commit=commit())
            facts.update(figures=self.shown)
            start = before or newest(config.model)
            complete(partial, start, describe_training(config, start, before is not None, **facts))
            torch.save(state, os.path.join(partial, "trainer", "trainer.pt"))
        machine.wait()
        path = os.path.join(partial, "trainer", f"rank_{machine.rank}.pt")
        torch.save(dict(random=random_state()), path)
        machine.wait()

        if machine.master:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            os.rename(partial, self.checkpoint)
            for old in checkpoints(config.out)[:-2]:
                shutil.rmtree(old)

    def finish(self):
        """End the training -> the path of its last checkpoint, which the first rank prints."""
        if self.tracker:
            self.tracker.finish()
        if self.machine.master:
            print("last checkpoint:", self.checkpoint)
        return self.checkpoint


def count_tokens(model, device):
    """Make the routers of a mixture of experts count which tokens they send where -> the routers.

    A dense model has none. A forward without gradients, such as a rollout's, does not count.
    """
    routers = [m for m in model.modules() if isinstance(m, Qwen3VLMoeTextTopKRouter)]

    def count(router, inputs, output):
        if torch.is_grad_enabled():
            experts = output[2].flatten().float()  # (N * k,)
            router.tokens += torch.histc(experts, router.num_experts, 0, router.num_experts - 1)

    for router in routers:
        router.tokens = torch.zeros(router.num_experts, device=device)
        router.register_forward_hook(count)
    return routers


def largest_expert(routers, machine):
    """{"largest_expert": share} of all ranks' tokens since the last call; {} of a dense model.

    It is the largest share of a layer's tokens that go to one expert (a token goes to k of them):
    k / experts where all are balanced, 1 where one expert gets every token.
    """
    if not routers:
        return {}
    tokens = machine.sum(torch.cat([router.tokens for router in routers]).tolist())
    tokens = np.array(tokens).reshape(len(routers), -1)  # (layers, experts)
    for router in routers:
        router.tokens.zero_()
    if not tokens.any():  # nothing was learnt from
        return dict(largest_expert=None)
    shares = tokens * routers[0].top_k / tokens.sum(1, keepdims=True)
    return dict(largest_expert=float(shares.max()))


def start_tracker(config):
    """The package that `--track` names, with a run named as the folder, which --resume continues.

    The project is $WANDB_PROJECT, or future-l1. Raises SystemExit if the package is not installed.
    """
    if config.track not in TRACKERS:
        raise SystemExit(f"--track is {config.track!r}, expected {' or '.join(TRACKERS)}")
    try:
        tracker = importlib.import_module(config.track)
    except ImportError as e:
        raise SystemExit(f"--track {config.track}: pip install {config.track} ({e})") from e
    name = os.path.basename(os.path.normpath(config.out))
    same = dict(id=name) if config.track == "wandb" else {}
    project = os.environ.get("WANDB_PROJECT", "future-l1")
    settings = dataclasses.asdict(config)
    tracker.init(project=project, name=name, config=settings, resume="allow", **same)
    return tracker


def commit():
    """The git commit of this code; None outside a checkout or without git."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --------------------------------------------------------------------------- inside a checkpoint


def optimizer_state(model, optimizer, keep=True):
    """{weight's name: {moment: whole tensor}}. All ranks call this together.

    keep: False on ranks that only take part. The learning rate and decay come from the config.
    """
    states = {}
    for name, p in model.named_parameters():
        to = "cpu" if keep else p.device
        state = {key: whole(x, to=to) for key, x in optimizer.state.get(p, {}).items()}
        if keep and state:
            states[name] = state
    return states


def restore(model, optimizer, checkpoint, trainer, rank):
    """Restore a checkpoint's optimizer state, of which each rank takes its part, and random state.

    If there are more ranks than before, the new ones take the random state of the last.
    """
    states = trainer.pop("optimizer")
    for name, p in model.named_parameters():
        if name in states:
            optimizer.state[p] = {key: part_of(x, p) for key, x in states[name].items()}
    path = os.path.join(checkpoint, "trainer", f"rank_{min(rank, trainer['world'] - 1)}.pt")
    set_random_state(torch.load(path, map_location="cpu", weights_only=True)["random"])


def random_state():
    """The random states of Python, numpy, torch and this process's GPU, as plain values."""
    name, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=[name, keys.tolist(), *rest],
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def set_random_state(state):
    """Restore what `random_state` returned. A device of another kind keeps its own state."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
