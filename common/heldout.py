"""What was held out, measured now and then while a run trains. sft.py's and la_dapo.py's.

    held_out = HeldOut(held_out_rows(config), config, machine)    # eval_data, eval_every, eval_rows
    for step in ...:
        ...                                                       # the step itself
        if held_out.due(step + 1, steps):
            with held_out.aside(model):
                for batch in held_out.batches(tokenizer, size):
                    ...                                           # the script's own figures
            line.update(held_out.line(run.log, ...))              # as eval_* in the step's line

Nothing of it reaches the training: no gradient, and random numbers go on from where they were. A
run that goes on may hold out other rows, at other steps. Source: ours.
"""

import contextlib
import time

import torch

from common.checkpoint import random_state, set_random_state
from common.formats import read_rows, report_bad
from data import Samples, loader


def held_out_rows(config):
    """The first eval_rows rows of config.eval_data (0 = all); [] if no file is named.

    Records that cannot be used are reported and left out, as those of config.data are.
    """
    if not config.eval_data:
        return []
    bad = []
    rows = read_rows(config.eval_data, config.media_root or None, bad)
    report_bad(bad, len(rows) + len(bad), config.max_bad)
    return rows[: config.eval_rows or None]


class HeldOut:
    """Rows that are measured and never learnt from, and their newest figures.

    shown: the newest first figure {eval_name: value}, for the progress bar.
    """

    def __init__(self, rows, config, machine):
        self.rows, self.config, self.machine = rows, config, machine
        self.shown, self.skipped, self.began = {}, [], 0.0

    def due(self, done, steps):
        """Whether to measure after `done` of `steps` steps: every eval_every, and at the end."""
        return bool(self.rows) and (done % self.config.eval_every == 0 or done == steps)

    @contextlib.contextmanager
    def aside(self, model):
        """Inside: evaluation mode, no gradient. Afterwards mode and random state are as before."""
        state, training, self.began = random_state(), model.training, time.time()
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(training)
            set_random_state(state)

    def batches(self, tokenizer, size, side="right", **encoding):
        """This rank's batches of all rows, `size` a batch, in their order. encoding: `encode`'s.

        The batches do not depend on the ranks. Each rank has as many, the last of them maybe empty:
        a forward that all ranks share in does not hang.
        """
        self.skipped, n = [], len(self.rows)
        plan = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
        plan += [[]] * (-len(plan) % self.machine.world)
        samples = Samples(self.rows, tokenizer, self.config, **encoding)
        plan, pad = self.machine.share(plan), tokenizer.pad_token_id or 0
        for batch in loader(samples, plan, self.config.workers, pad_id=pad, side=side):
            self.skipped += batch["skipped"]
            yield batch

    def line(self, log, judge=None, **figures):
        """Figures -> the fields of the step's line: each as eval_NAME, who was skipped, seconds.

        The skipped are named, and the judge's failures counted, apart from the training's.
        """
        skipped, failures = log.skips(self.skipped, judge)
        fields = {f"eval_{name}": value for name, value in figures.items()}
        self.shown = dict(list(fields.items())[:1])
        if judge:
            fields["eval_judge_failures"] = dict(failures)
        fields["eval_skipped"] = [list(skip) for skip in skipped]
        return dict(fields, eval_seconds=round(time.time() - self.began, 4))
