"""What every run needs: ranks, checkpoints, logs, a folder that is not overwritten."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from common.checkpoint import restore, save_checkpoint
from common.folder import (
    checkpoints,
    complete,
    describe_training,
    model_fingerprint,
    newest,
    one_line_if_missing,
)
from common.formats import read_rows, report_bad
from common.lora import adapters, add_adapters, merged, put_adapters
from common.shard import Whole, shard, whole
from data import at_least
from model import best_attention, load


def read_lines(path):
    """A results file -> its lines as dicts.

    A half-written last line (a killed run) is cut off the file and redone.
    """
    with open(path, "rb") as f:
        text = f.read()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not a results file ({e})") from e


# may change between run and resume; the last two are la_dapo.py's
HARMLESS = {"resume", "out", "workers", "max_bad", "save_every", "track"}
HARMLESS |= {"eval_data", "eval_every", "eval_rows"}
HARMLESS |= {"gradient_checkpointing", "micro_batch", "shard", "sample_every", "judge_url"}
HARMLESS |= {"cuda_graph"}


TRACKERS = ("wandb", "trackio")  # packages of the same three functions: init, log, finish
_started = []  # those that this process logs to


def check_ranks(config):
    """Raises ValueError if shard and lora_rank of a training's config do not fit. Source: ours."""
    at_least(config, 0, "lora_rank")
    if config.shard and config.lora_rank:
        raise ValueError("lora_rank: not with shard; each rank has the whole frozen model")


def set_up_ranks():
    """torchrun's environment, or a single process -> rank, world, device. Source: ours."""
    disable_progress_bar()  # transformers' own, for every load and save
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=3)
        )  # the others wait while rank 0 writes a checkpoint
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not torch.cuda.is_available():
        return rank, world, torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return rank, world, torch.device("cuda", torch.cuda.current_device())


def leave(code=0):
    """The end of a script that may run under torchrun: all ranks leave together. Source: ours.

    code: the exit code. A rank that leaves with another than 0 waits for nobody: torchrun ends the
    others.

    With gloo the process ends here, before the interpreter is taken down. There gloo's threads
    often abort it (SIGABRT: on a busy CPU in 31 of 40 bare two-rank launches, in none of 40 that
    end this way), and torchrun then calls a run that was done failed.
    """
    while _started:
        _started.pop().finish()
    if not dist.is_initialized():
        return sys.exit(code) if code else None
    if not code:
        dist.barrier()
        if dist.get_backend() != "gloo":
            return dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sum_over_ranks(values, device):
    """Numbers -> their sums over all ranks, as floats. Source: ours."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def need_data(config):
    """Raises SystemExit if no data file is named. Source: ours."""
    if not config.data:
        raise SystemExit(
            "--data is missing: a .json, .jsonl or .parquet file of records (see common/formats.py)"
        )


def rows_of(config):
    """The rows of config.data. Source: ours.

    Records that cannot be used are reported and left out. Raises SystemExit if no file is named or
    too many records are bad, RecordError if the file holds no records.
    """
    need_data(config)
    bad = []
    rows = read_rows(config.data, config.media_root or None, bad)
    report_bad(bad, len(rows) + len(bad), config.max_bad)
    return rows


def fingerprint(rows):
    """What a run was trained on: ids, questions, options, answers, texts and frames of all rows.

    Source: ours. A frame counts by its path and index, or by its bytes; a cue where there is one.
    """
    digest = hashlib.sha256()
    for row in rows:
        parts = (row.id, row.question, row.options, row.answer, row.prompt, row.response)
        digest.update(repr(parts).encode())
        digest.update(row.cue.encode())
    return digest.hexdigest()


def resume_point(config, rows):
    """-> newest checkpoint of config.out or None, its trainer.pt, the rows' fingerprint.

    Source: ours. Raises SystemExit if there is one and `resume` is off, or if it was made with
    other rows or values.
    """
    trained_on = fingerprint(rows)
    checkpoint = (checkpoints(config.out) or [None])[-1]
    if checkpoint is None:
        return None, None, trained_on
    if not config.resume:
        raise SystemExit(
            f"{config.out} already holds {os.path.basename(checkpoint)}: pass --resume to "
            "continue it, or another --out"
        )
    path = os.path.join(checkpoint, "trainer", "trainer.pt")
    if not os.path.exists(path):
        raise SystemExit(f"{checkpoint} cannot be continued: it has no trainer/trainer.pt")
    trainer = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if trainer["rows"] != trained_on:
        raise SystemExit(f"{checkpoint} was trained on other rows than those of {config.data}")
    before, now = trainer["config"], dataclasses.asdict(config)
    names = (before.keys() | now.keys()) - HARMLESS  # a field that only one of them has differs too
    changed = sorted(k for k in names if (k in before, before.get(k)) != (k in now, now.get(k)))
    if changed:
        raise SystemExit(f"{checkpoint} was made with other values of {', '.join(changed)}")
    return checkpoint, trainer, trained_on


def read_log(path):
    """log.jsonl -> its lines as dicts; a half-written last line (a killed run) is left out."""
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def trim_log(path, first):
    """Drop what was logged from step `first` on: it is about to be done again. Source: ours."""
    kept = [line for line in read_log(path) if line["step"] < first] if os.path.exists(path) else []
    with open(path + ".part", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in kept)
    os.replace(path + ".part", path)


def commit():
    """The code's git commit, or None outside a checkout or without git. Source: ours."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path, text):
    """A file as a whole or not at all."""
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".part", path)


def write_json(path, content):
    """Write a JSON file under a temporary name, then rename it. Source: ours."""
    with open(path + ".part", "w") as f:
        json.dump(content, f, indent=1)
    os.replace(path + ".part", path)


# ------------------------------------------------------------------------------------------ machine


class Machine:
    """Where this process runs: its rank, its device, its arithmetic. Source: ours.

    shard: whether each of several ranks holds a part of the weights (common/shard.py).
    """

    def __init__(self, bf16=True, shard=False):
        self.rank, self.world, self.device = set_up_ranks()
        self.master = self.rank == 0
        self.bf16 = bf16 and self.device.type == "cuda"
        self.shard = shard and self.world > 1

    def autocast(self):
        """bf16 arithmetic on CUDA, where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, values):
        """Numbers -> their sums over all ranks, as floats."""
        return sum_over_ranks(values, self.device)

    def gather(self, items):
        """A list -> the lists of all ranks, one after another."""
        if self.world == 1:
            return list(items)
        lists = [None] * self.world
        dist.all_gather_object(lists, list(items))
        return sum(lists, [])

    def wait(self):
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def load(self, folder, train=False, **kwargs):
        """A model's folder, a run's folder or a hub id -> (model, tokenizer).

        Weights in fp32 to train; else bf16 on CUDA, in evaluation mode. What is to be sharded stays
        in the host's memory till then.
        """
        dtype = torch.bfloat16 if self.bf16 and not train else torch.float32
        attention = best_attention() if self.bf16 else "sdpa"
        options = dict(dtype=dtype, attn_implementation=attention, **kwargs)
        folder = newest(folder)
        with one_line_if_missing(folder):
            model, tokenizer = load(folder, **options)
        model = model if self.shard else model.to(self.device)
        return model.train(train), tokenizer

    def wrap(self, module, unused):
        """A module that holds `.model` -> the same over all ranks: DDP, or with shard in parts.

        Both add up the ranks' gradients. A mean would be wrong: the loss is divided by the counts
        of all ranks. unused: whether a forward may leave out weights that are trained.
        """
        if self.shard:
            return shard(module, module.model, self.bf16)
        if self.world == 1:
            return module
        options = dict(gradient_as_bucket_view=True, find_unused_parameters=unused)
        ddp = DistributedDataParallel(module, **options)
        ddp.register_comm_hook(None, add_up)
        return ddp

    def gathered(self, model):
        """A model of `load` -> what runs a function of it while its weights are there: `Whole`."""
        return shard(Whole(model), model, self.bf16) if self.shard else Whole(model)

    def share(self, items):
        """This rank's part of a list."""
        return items[self.rank :: self.world]

    def step(self, optimizer, lr, clip):
        """Add up the gradients of all ranks, then `step_or_skip` -> their norm.

        A sum, not a mean: the loss was divided by the counts of all ranks. With shard the backward
        has added them up.
        """
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # on every rank alike
            if self.world > 1 and not self.shard:
                dist.all_reduce(p.grad)
        return step_or_skip(optimizer, trained, lr, clip)


def add_up(_, bucket):
    """DDP's hook: the gradients in a bucket -> a Future of their sums over the ranks. Ours."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def step_or_skip(optimizer, trained, lr, clip):
    """Clip the gradient and step, unless it is not finite -> its norm. Source: ours."""
    norm = whole(torch.nn.utils.clip_grad_norm_(trained, clip)).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):  # the norm is that of the summed gradient: all ranks decide alike
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Tally:
    """Named figures of a step: values with mean and deviation, counts, seconds. Source: ours."""

    def __init__(self):
        self.values, self.counts, self.spent = Counter(), Counter(), Counter()

    def add(self, name, values):
        """Some values of a figure; None = there is none."""
        values = [v for v in values if v is not None]
        self.values[name, "n"] += len(values)
        self.values[name, "sum"] += sum(values)
        self.values[name, "squares"] += sum(v * v for v in values)

    def count(self, name, k=1):
        self.counts[name] += k

    def __getitem__(self, name):
        return self.counts[name]

    @contextlib.contextmanager
    def clock(self, name):
        """Counts the seconds spent inside."""
        began = time.time()
        yield
        self.spent[name] += time.time() - began

    def over(self, machine):
        """The sums over all ranks; the seconds stay this rank's."""
        total = Tally()
        for values, counts in machine.gather([(self.values, self.counts)]):
            total.values.update(values)
            total.counts.update(counts)
        total.spent = self.spent
        return total

    def means(self, names=()):
        """{name: mean, name_std: deviation} of these names, 0 where there is no value, and of all
        others that were added.
        """
        added, out = [name for name, _ in self.values], {}
        for name in dict.fromkeys([*names, *added]):
            n = max(1, self.values[name, "n"])
            mean = self.values[name, "sum"] / n
            out[name] = mean
            out[f"{name}_std"] = math.sqrt(max(0.0, self.values[name, "squares"] / n - mean**2))
        return out

    def seconds(self):
        """{seconds_name: seconds}."""
        return {f"seconds_{name}": round(value, 4) for name, value in self.spent.items()}


def tracker(name):
    """The package that `--track` names, imported. Raises SystemExit if it is not installed."""
    if name not in TRACKERS:
        raise SystemExit(f"--track is {name!r}, expected {' or '.join(TRACKERS)}")
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise SystemExit(f"--track {name} needs a package: pip install {name} ({e})") from e


class Log:
    """A run's log.jsonl and progress bar, on the first rank. Source: ours."""

    def __init__(self, config, first, machine):
        self.path, self.first = os.path.join(config.out, "log.jsonl"), first
        self.machine, self.tracker, self.bar, self.shown = machine, None, None, {}
        if machine.master:
            trim_log(self.path, first)
            if config.resume and not first:
                print(f"nothing to resume in {config.out}: starting at step 0")
            if config.track:
                self.tracker = tracker(config.track)
                self.tracker.init(project="future-l1", config=dataclasses.asdict(config))
                _started.append(self.tracker)

    def say(self, text):
        if self.machine.master:
            print(text)

    def steps(self, steps, name):
        """The numbers of the steps that are still to do, under a progress bar."""
        hidden = not self.machine.master
        some = range(self.first, steps)
        self.bar = tqdm(
            some, initial=self.first, total=steps, desc=name, disable=hidden, mininterval=2
        )
        return self.bar

    def skips(self, skipped, judge=None):
        """Name what this rank skipped -> what all ranks skipped, and the judge's failures of the
        step.
        """
        for where, why in skipped:
            tqdm.write(f"skipped {where}: {why}")
        failures = Counter(judge.failures) if judge else Counter()
        if judge:
            judge.failures.clear()
        everyones = self.machine.gather([(skipped, failures)])
        skipped = [skip for some, _ in everyones for skip in some]
        return skipped, sum((some for _, some in everyones), Counter())

    def write(self, line, **shown):
        """A step's line; `shown` goes beside the progress bar."""
        self.shown = shown
        if not self.machine.master:
            return
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        self.bar.set_postfix(
            {name: f"{v:.3f}" if isinstance(v, float) else v for name, v in shown.items()}
        )
        if line.get("groups") == 0:
            tqdm.write(f"step {line['step']}: no group kept, no update")
        if line.get("update_skipped") and line["grad_norm"] is None:
            tqdm.write(f"step {line['step']}: no sample could be used, no update")
        elif line.get("updates_skipped") or line.get("update_skipped"):
            tqdm.write(f"step {line['step']}: gradient is not finite, update skipped")
        if self.tracker:
            self.tracker.log(line)


class Run:
    """A training's folder: its guard, its checkpoints, its log. Source: ours.

    name: what is trained, in a word. A run is continued under its own name only. checkpoint, state:
    the newest checkpoint of the folder and its trainer.pt, or None. first: the step to begin with.
    Raises SystemExit as `resume_point` does.
    """

    def __init__(self, config, rows, machine, name):
        self.config, self.machine, self.name, self.log = config, machine, name, None
        self.checkpoint, self.state, self.rows = resume_point(config, rows)
        if self.state and self.state["name"] != name:
            raise SystemExit(f"{self.checkpoint} trained {self.state['name']!r}, not {name!r}")
        self.first = self.state["step"] if self.state else 0
        self.origin = None

    def start_folder(self, other=""):
        """The folder or hub id that the run began with, for a run that needs it to the end. Ours.

        other: a model beside config.model, if that is what it needs. Raises SystemExit if a run
        that goes on does not find there what it began with.
        """
        folder = (
            self.state["origin"]["folder"] if self.state else newest(other or self.config.model)
        )
        self.origin = dict(folder=folder, weights=model_fingerprint(folder))
        if self.state and self.state["origin"] != self.origin:
            raise SystemExit(
                f"{self.checkpoint} needs {folder}, where the run began and which holds other "
                "weights now"
            )
        return folder

    def load(self, **options):
        """What is trained, as the newest checkpoint holds it or where the run begins.

        In fp32, its vision tower frozen or not; with lora_rank adapters beside the model that the
        run began with -> (model, tokenizer). options: as `Machine.load`.
        """
        config = self.config
        if config.lora_rank:
            model, tokenizer = self.machine.load(self.start_folder(), **options)
            add_adapters(model, config.lora_rank).train()
            if self.state:
                put_adapters(model, self.state["adapters"])
        else:
            folder = self.checkpoint or newest(config.model)
            model, tokenizer = self.machine.load(folder, train=True, **options)
            model.model.visual.requires_grad_(not config.freeze_vision)
        if config.gradient_checkpointing:
            once_more = dict(use_reentrant=False)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=once_more)
        return model, tokenizer

    def start(self, model, optimizer, text):
        """Put back what the checkpoint holds, open the log, say `text`."""
        if self.state:
            restore(model, optimizer, self.checkpoint, self.state, self.machine.rank)
        os.makedirs(self.config.out, exist_ok=True)
        if self.machine.master:
            path = os.path.join(self.config.out, "settings.json")
            write_json(path, dataclasses.asdict(self.config))
        self.log = Log(self.config, self.first, self.machine)
        self.log.say(text)

    def save_if_due(self, done, steps, model, tokenizer, optimizer, **state):
        """After `done` of `steps` steps: every save_every steps and at the end -> whether it was.

        state: what the script wants back in `Run.state`, plain values.
        """
        if done % self.config.save_every and done != steps:
            return False
        before = self.checkpoint  # of this run, or None
        self.checkpoint = os.path.join(self.config.out, f"step_{done:06d}")
        state.update(step=done, name=self.name, config=dataclasses.asdict(self.config))
        state.update(world=self.machine.world, rows=self.rows, origin=self.origin)

        if self.config.lora_rank:
            state.update(adapters={name: p.detach() for name, p in adapters(model).items()})

        def write_model(folder, weights):
            facts = dict(name=self.name, step=done, rows=self.rows, commit=commit())
            facts.update(figures=self.log.shown)
            start, resumed = before or newest(self.config.model), before is not None
            weights = merged(model, weights) if self.config.lora_rank else weights
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            complete(folder, start, describe_training(self.config, start, resumed, **facts))

        save_checkpoint(self.checkpoint, write_model, state, model, optimizer, self.machine)
        return True
