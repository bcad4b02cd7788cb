"""Where a process runs: its rank, its device, its arithmetic, and a model over several ranks.

    machine = Machine(config.bf16, config.shard)
    run = machine.wrap(model)         # run(f, *args) is f(model, *args)
    (loss * machine.world).backward()    # with several ranks this averages over them

`wrap` has three cases. One process: f is called plainly. Several: through DistributedDataParallel.
With --shard: through PyTorch's FSDP2, `fully_shard`. Both of these average the gradients of the
ranks. A loss that was divided by the counts of all ranks is therefore multiplied by their number.

With --shard each rank keeps its part of every weight, gradient and moment of Adam, in fp32. A layer
of the language model is gathered while it runs, forward and backward. Everything else (vision
tower, embeddings, norm, output layer) is gathered once a forward, by the root module, so ranks do
not deadlock when only some of them have images. On CUDA the gathered weights are bf16, half to send
and half to hold; under autocast alone, each layer's bf16 copy would stay as long as the graph.
Gradients are summed over the ranks in fp32. Every forward and backward needs all ranks, so all of
them run the same number.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils.logging import disable_progress_bar

from common.folder import newest, one_line_if_missing
from model import best_attention, load


class Machine:
    """The rank of this process, its device and its arithmetic.

    shard: whether each of several ranks holds a part of the weights.
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
        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

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

    def my_part(self, items):
        """This rank's part of a list."""
        return items[self.rank :: self.world]

    def load(self, folder, train=False, frozen=False, **kwargs):
        """A model's folder, a run's folder or a hub id -> (model, tokenizer).

        Weights are in fp32 to train; else in bf16 on CUDA, and in evaluation mode. frozen: a model
        that computes as one that is trained, always under autocast: see `narrow`. A model that will
        be sharded stays in the host's memory until then.
        """
        # FSDP gathers all weights of what is trained in bf16, so plain bf16 is the same
        under_autocast = self.bf16 and frozen and not self.shard
        dtype = torch.bfloat16 if self.bf16 and not train else torch.float32
        dtype = torch.float32 if under_autocast else dtype
        attention = best_attention() if self.bf16 else "sdpa"
        folder = newest(folder)
        with one_line_if_missing(folder):
            model, tokenizer = load(folder, dtype=dtype, attn_implementation=attention, **kwargs)
        model = narrow(model) if under_autocast else model
        model = model if self.shard else model.to(self.device)
        return model.train(train), tokenizer

    def decoder(self, model):
        """A model that is trained -> the one to roll out with: itself, or a copy of it in bf16."""
        adapted = model.latent_rows is not None  # --lora_rank: its matrices are in bf16 already
        if self.shard or (self.bf16 and not adapted):
            return whole_copy(model, self.bf16)
        return model

    def wrap(self, model, unused=False):
        """A model of `load` -> run, a module with run(f, *args, **kwargs) = f(model, ...).

        unused: a backward may leave out weights that are trained, so DDP has to search for them.
        A model without trained weights needs no DDP. f's arguments are tensors or dataclasses:
        FSDP would copy every tensor inside a dict to the GPU.
        """
        run = Calls(model)
        if self.shard:
            return shard(run, model, self.bf16)
        if self.world == 1 or not any(p.requires_grad for p in model.parameters()):
            return run
        return DistributedDataParallel(
            run,
            broadcast_buffers=False,  # rotary positions are equal, and ranks may differ in forwards
            gradient_as_bucket_view=True,
            find_unused_parameters=unused,
        )


class Calls(torch.nn.Module):
    """forward(f, ...) = f(model, ...): what DDP and FSDP wrap, whatever f is."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, f, *args, **kwargs):
        return f(self.model, *args, **kwargs)


def without_ddp(run):
    """`Machine.wrap`'s result for forwards whose number differs between ranks, if not sharded."""
    return run.module if isinstance(run, DistributedDataParallel) else run


def set_sync(run, last):
    """Whether the next backward averages gradients over the ranks: DDP does once an update.

    Set before the forward. FSDP does after every backward, because no rank holds whole gradients.
    """
    if isinstance(run, DistributedDataParallel):
        run.require_backward_grad_sync = last


def set_up_ranks():
    """torchrun's environment, or a single process -> rank, world, device."""
    disable_progress_bar()  # transformers' own, for every load and save
    device = torch.device("cpu")
    if torch.cuda.is_available():  # first, so that NCCL connects this GPU and no guessed one
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(hours=3),  # others wait while rank 0 writes a checkpoint
            device_id=device if on_gpu else None,
        )
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rank, world, device


def leave(code=0):
    """The end of a script that may run under torchrun: all ranks leave together.

    A rank that leaves with another code than 0 waits for nobody, because torchrun ends the others.
    gloo's threads often crash at interpreter shutdown (SIGABRT in 31 of 40 launches), and torchrun
    then reports a finished run as failed; os._exit avoids this.
    """
    if not dist.is_initialized():
        return sys.exit(code) if code else None
    if not code:
        dist.barrier()
        if dist.get_backend() != "gloo":
            return dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------ bf16 weights


def narrow(model):
    """Round all matrices to bf16, in place, as autocast does in every product -> model.

    Embeddings and vectors stay in fp32, and so does the sum from layer to layer. Under autocast the
    model is then bit for bit the one with fp32 weights, in about half the memory: a policy and its
    reference with equal weights have a KL of exactly 0. The output layer becomes a matrix of its
    own where it was tied to the embeddings, so that it is not rounded at every token. Ours.
    """
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim >= 2 and not isinstance(module, torch.nn.Embedding):
                setattr(module, name, torch.nn.Parameter(p.detach().bfloat16(), p.requires_grad))
    return model


# ---------------------------------------------------------------------------------- sharded weights


def shard(root, model, bf16):
    """Spread the weights of root, a module that holds `model` (FutureL1), over the ranks -> root.

    model may lie in the host's memory: its parts go to the device. bf16: what is gathered.
    """
    policy = MixedPrecisionPolicy()
    if bf16:
        dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
        sum_in_fp32(model)
    for module in (*model.model.language_model.layers, root):
        fully_shard(module, mp_policy=policy, reshard_after_forward=True)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no average: sum, then divide
    root.set_reduce_scatter_unused_params(True)  # of one rank's batch without pictures
    return root


def sum_in_fp32(model):
    """Words are embedded in fp32, so the sum from layer to layer is fp32, as under autocast."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, x: x.float())


def whole(x, dtype=None, to="cpu"):
    """A rank's part of a tensor -> the whole tensor on device `to`. All ranks call this together.

    A tensor that is not sharded stays where it is.
    """
    x = x.detach() if dtype is None else x.detach().to(dtype)
    return x.full_tensor().to(to) if isinstance(x, DTensor) else x


def part_of(x, like):
    """A whole tensor -> the part of it that this rank keeps, as it keeps `like`."""
    if not isinstance(like, DTensor) or x.ndim == 0:
        return x.to(like.device)
    mesh = like.device_mesh
    rows = -(-len(x) // mesh.size())
    own = x[rows * mesh.get_local_rank() :][:rows].to(like.device, copy=True)
    size = dict(shape=like.shape, stride=like.stride())
    return DTensor.from_local(own, mesh, like.placements, run_check=False, **size)


def whole_weights(model, dtype=None, to="cpu", keep=True):
    """{name: whole weight}; tied weights stay one tensor. All ranks call this together.

    keep: False on ranks that only take part.
    """
    weights, seen = {}, {}
    for name, p in model.state_dict(keep_vars=True).items():
        if p not in seen:
            x = whole(p, dtype, to if keep else p.device)
            seen[p] = x if keep else None
        weights[name] = seen[p]
    return weights


def whole_copy(model, bf16):
    """A FutureL1 that is trained -> a frozen one with all weights on this rank, to decode with.

    Each rank decodes other prompts, token by token: gathering every layer for each token would take
    longer than the layer, and so would rounding fp32 weights to bf16. The copy costs 2 bytes per
    weight on CUDA, as long as it lives; what stays in fp32 (`narrow`) is the model's own.
    """
    with torch.device("meta"):
        copy = type(model)(model.config)
    sharded = isinstance(next(model.parameters()), DTensor)
    dtype = torch.bfloat16 if bf16 and sharded else None  # as FSDP gathers them
    copy.load_state_dict(whole_weights(model, dtype, model.device), assign=True)
    for own, theirs in zip(copy.modules(), model.modules()):
        own._buffers.update(theirs._buffers)  # of rotary positions; those are not sharded
    copy.generation_config = model.generation_config
    if bf16:
        sum_in_fp32(narrow(copy))
    return copy.requires_grad_(False).eval()
