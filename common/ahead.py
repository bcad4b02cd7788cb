"""Samples read ahead by worker processes, of which one may be killed without ending the run."""

import collections
import signal
import threading
from itertools import chain

import torch
from torch.utils.data import DataLoader

from common.formats import Skipped


def read_ahead(samples, batches, workers, collate_fn=list):
    """Yields collate_fn of the samples of each list of indices; `workers` processes read ahead.

    If a worker is killed, for example because memory ran out, its batch is read again, each sample
    in a process of its own. A sample whose process is killed too becomes a Skipped, and the run
    goes on. samples: a Dataset with `rows`.
    """
    batches, given = iter(batches), collections.deque()  # given: to workers, not yet back

    def plan():
        for batch in batches:
            given.append(batch)
            yield batch

    while True:
        ahead = iter(_loader(samples, plan(), workers, collate_fn))
        if workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever the main thread is just then
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for batch in ahead:
                given.popleft()
                yield batch
            return
        except RuntimeError as e:
            if not _is_killed(e):
                raise
        del ahead
        yield collate_fn([_read_alone(samples, i) for i in given.popleft()])
        batches = chain(list(given), batches)
        given.clear()


def _loader(samples, batches, workers, collate_fn):
    """A DataLoader with a generator of its own, because each draws a number when it starts."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )


def _is_killed(error):
    return str(error).startswith("DataLoader worker (pid")


def _read_alone(samples, i):
    """Sample i, read by a process of its own; a Skipped if that is killed as well."""
    try:
        [[sample]] = _loader(samples, [[i]], 1, list)
    except RuntimeError as e:
        if not _is_killed(e):
            raise
        return Skipped(samples.rows[i].where, "the process that read it was killed")
    return sample
