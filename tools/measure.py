"""Seconds of a piece of work, several ways in turn; a book of measurements that has to end.

A piece of work is a function without arguments. Source: ours.
"""

import gc
import statistics
import time
import traceback
from typing import NamedTuple

import torch


def seconds(work, device="cpu"):
    """Run work() -> seconds: on a GPU those of the wall, on a CPU those of this process.

    A CPU is shared with others: their share of the wall's seconds is not the work's.
    """
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(ways, rounds):
    """{name: work} in turn on a CPU, so many times -> {name: [seconds]}: noise is shared."""
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work))
    return times


class Ratio(NamedTuple):
    """One way's seconds over another's, of the same round."""

    median: float
    least: float
    largest: float

    def __str__(self):
        return f"{self.median:.2f} ({self.least:.2f} - {self.largest:.2f})"


def ratio(some, others):
    """Seconds of two ways that took turns, a number a round each -> Ratio."""
    ratios = [a / b for a, b in zip(some, others)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


class Book:
    """What was measured by a deadline: {name: {figure: number}}, or the reason why there is none.

    A failure is shown and written down, and the next measurement begins: who rents a card wants the
    others. It is in `failed`, and the command ends as an error.
    """

    def __init__(self, deadline, save=None):
        self.deadline = deadline  # seconds since the epoch
        self.save = save or (lambda book: None)  # called after each measurement
        self.figures, self.missing, self.failed = {}, {}, []

    def measure(self, name, needs, work):
        """Run work() -> what it gives, a dict of figures or an object; None if it did not end.

        needs: seconds that have to be left.
        """
        left, result = self.deadline - time.time(), None
        if left < needs:
            self.missing[name] = "not run: no time left"
            return None
        print(f"{name} ({left:.0f} s left)", flush=True)
        try:
            result = work()
        except Exception as error:
            if "out of memory" in str(error).lower():
                self.missing[name] = "out of memory"
            else:
                traceback.print_exc()
                self.missing[name] = f"failed: {type(error).__name__}"
                self.failed.append(name)
        if isinstance(result, dict):
            self.figures[name] = result
        self.save(self)
        free()
        return result


def free():
    """Give back what nobody holds any more, to the card as well."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
