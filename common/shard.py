"""Weights spread over the ranks (--shard): PyTorch's FSDP2, `fully_shard`. Ours.

Each rank keeps its part of every weight, gradient and moment of Adam, in fp32. A layer of the
language model is gathered while it runs, forward and backward. All else (vision tower, embeddings,
norm, output layer) is gathered once a forward, by the root, the module whose `forward` is called:
so a batch without pictures on one rank alone leaves nobody waiting.

On CUDA what is gathered is bf16: half to send, half to hold, and autocast has nothing to copy.
Under autocast alone each layer's copy would stay as long as the graph. What autocast keeps in fp32
stays so, the sum that runs from layer to layer too; only the norms' weights are rounded, as in
evaluation. Gradients are added up over the ranks in fp32.

Every forward and backward is a meeting of all ranks, so all run the same number of them.
"""

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


class Whole(torch.nn.Module):
    """A module's functions while its weights are there: forward(f) = f(module).

    f: a function, not arguments of its own, which FSDP would copy to the device.
    """

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, function):
        return function(self.module)


def shard(root, model, bf16):
    """Spread the weights of root, a module that holds `model` (FutureL1), over the ranks -> root.

    model may lie in the host's memory: its parts go to the device. bf16: what is gathered.
    """
    kept = MixedPrecisionPolicy()
    if bf16:
        dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        kept = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
        sum_in_fp32(model)
    for module in (*model.model.language_model.layers, root):
        fully_shard(module, mp_policy=kept, reshard_after_forward=True)
        # a sum, not a mean: the losses are divided by the counts of all ranks
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    root.set_reduce_scatter_unused_params(True)  # on one rank, of a batch without pictures
    return root


def sum_in_fp32(model):
    """Words are embedded in fp32, so the sum from layer to layer is fp32, as under autocast."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, x: x.float())


def whole(x, dtype=None, to="cpu"):
    """A rank's part of a tensor -> all of it, there; a whole one as it is. All ranks together."""
    x = x.detach() if dtype is None else x.detach().to(dtype)
    return x.full_tensor().to(to) if isinstance(x, DTensor) else x


def part_of(x, like):
    """A whole tensor -> what this rank keeps of it, as it keeps `like`."""
    if not isinstance(like, DTensor) or x.ndim == 0:
        return x.to(like.device)
    mesh = like.device_mesh
    rows = -(-len(x) // mesh.size())
    own = x[rows * mesh.get_local_rank() :][:rows].to(like.device, copy=True)
    size = dict(shape=like.shape, stride=like.stride())
    return DTensor.from_local(own, mesh, like.placements, run_check=False, **size)


def whole_weights(model, dtype=None, to="cpu", keep=True):
    """{name: whole weight}; weights that are one, like tied ones, stay one. All ranks together.

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
    """A sharded FutureL1 -> a plain one with all weights on this rank, to decode with.

    Each rank decodes other prompts, token by token: gathering every layer for each would take
    longer than the layer. It costs 2 bytes a weight on CUDA, as long as it lives.
    """
    with torch.device("meta"):
        copy = type(model)(model.config)
    dtype = torch.bfloat16 if bf16 else None
    copy.load_state_dict(whole_weights(model, dtype, model.device), assign=True)
    for own, theirs in zip(copy.modules(), model.modules()):
        own._buffers.update(theirs._buffers)  # of rotary positions; those are not spread
    copy.generation_config = model.generation_config
    if bf16:
        sum_in_fp32(copy)
    return copy.requires_grad_(False).eval()
