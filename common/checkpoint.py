"""A training's optimizer, and what a checkpoint holds beside the model's folder. Ours.

trainer/trainer.pt     where the run is, and the optimizer's state by the weights' names: whole
                       tensors, so that another number of ranks goes on with it, --shard or not
trainer/rank_R.pt      random state of rank R
"""

import os
import random
import shutil

import numpy as np
import torch

from common.folder import checkpoints
from common.shard import part_of, whole, whole_weights


def make_optimizer(model, config):
    """AdamW over what is trained, weight decay on matrices only -> optimizer, its parameters.

    Source: paper Table 8.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trained if p.ndim >= 2], weight_decay=config.weight_decay),
        dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0),
    ]
    adam = dict(lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    return torch.optim.AdamW(groups, **adam), trained


def optimizer_state(model, optimizer, keep=True):
    """{weight's name: {moment: whole tensor}}. All ranks call this together. Source: ours.

    keep: False on ranks that only take part. Learning rate and decay are the config's.
    """
    states = {}
    for name, p in model.named_parameters():
        to = "cpu" if keep else p.device
        state = {key: whole(x, to=to) for key, x in optimizer.state.get(p, {}).items()}
        if keep and state:
            states[name] = state
    return states


def put_back(states, model, optimizer):
    """The other way round: each rank takes its part. Source: ours."""
    for name, p in model.named_parameters():
        if name in states:
            optimizer.state[p] = {key: part_of(x, p) for key, x in states[name].items()}


def save_checkpoint(folder, write_model, trainer, model, optimizer, machine):
    """All ranks: a checkpoint's folder, of what write_model(folder, weights) writes and trainer/.

    It is written under a temporary name and renamed: a killed save leaves no half checkpoint. Ours.
    """
    weights = whole_weights(model, keep=machine.master)
    trainer = dict(trainer, optimizer=optimizer_state(model, optimizer, machine.master))
    partial = os.path.join(os.path.dirname(folder), ".partial_" + os.path.basename(folder))

    # the first rank makes the folder, then each adds its own file
    if machine.master:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(os.path.join(partial, "trainer"))
        write_model(partial, weights)
        torch.save(trainer, os.path.join(partial, "trainer", "trainer.pt"))
    machine.wait()
    path = os.path.join(partial, "trainer", f"rank_{machine.rank}.pt")
    torch.save(dict(random=random_state()), path)
    machine.wait()

    # all is there: it gets its name, and all but the last two go
    if machine.master:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
        for old in checkpoints(os.path.dirname(folder))[:-2]:
            shutil.rmtree(old)


def restore(model, optimizer, checkpoint, trainer, rank):
    """Optimizer and random state of a checkpoint, back in place on each rank. Source: ours."""
    name = f"rank_{min(rank, trainer['world'] - 1)}.pt"
    path = os.path.join(checkpoint, "trainer", name)
    own = torch.load(path, map_location="cpu", weights_only=True)
    put_back(trainer.pop("optimizer"), model, optimizer)
    set_random_state(own["random"])


def random_state():
    """Python's, numpy's, torch's and this process's GPU's, as plain values. Source: ours."""
    name, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=[name, keys.tolist(), *rest],
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def set_random_state(state):
    """The other way round. A run that goes on with another device keeps that device's state."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
