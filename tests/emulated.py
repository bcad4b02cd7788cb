"""CUDA's rules with real numbers, without a GPU: a plugin for pytest.

    python -m pytest -p tests.emulated -m cuda tests/test_cuda.py tests/test_emulated.py

Under it there is a device "cuda". Its tensors keep their numbers on the CPU, where every operation
is computed; but what CUDA would refuse is refused here as well:

* an operation on tensors of both devices, except copies, indices on the CPU and single numbers
* layer norms of two dtypes; products and writes of two dtypes the CPU refuses by itself
* a generator of the CPU for numbers on the GPU
* inside a captured graph, everything that waits for the GPU, and every copy from the CPU

Autocast is CUDA's. The backward runs in the device's thread. A graph records its operations
without running them; a replay runs them again and writes to the places of the recording.

It shows nothing about kernels: their speed, their memory, which shapes they take, the order in
which they add. It uses private parts of torch, so it is used with VERSION only. Source: ours.
"""

import contextlib
from typing import NamedTuple

from tools.pretended import PRETENDED  # before torch

import torch  # isort: skip
import torch.nn.functional as F
import transformers
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from common import shared_prefix

VERSION = "2.13.0"
aten = torch.ops.aten

# operations whose result the host has to know before it can go on
WAITS = {aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.unique_consecutive}
WAITS |= {aten.bincount, aten.repeat_interleave, aten.masked_select, aten.equal}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}
WIDE = {aten.mm.dtype, aten.bmm.dtype}  # products of bf16 whose result is fp32


class Refused(RuntimeError):
    """CUDA would refuse this."""


class CudaTensor(torch.Tensor):
    """A tensor that says it is on the GPU. Its numbers are those of `host`, a CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        layout = dict(strides=host.stride(), storage_offset=host.storage_offset())
        kind = dict(dtype=host.dtype, device="cuda:0")
        self = torch.Tensor._make_wrapper_subclass(cls, host.shape, **layout, **kind)
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"{self.host!r} on cuda"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.host.__reduce_ex__(protocol)  # what is saved is read back on the CPU


class OnCuda(TorchDispatchMode):
    """Also sees operations that make a tensor from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


# ------------------------------------------------------------------------------------ one operation

recording = None  # of the graph that is being captured: [(func, args, kwargs, results)]


def run(func, args, kwargs):
    """One operation: plain if no GPU takes part, else checked and then done on the CPU."""
    flat, spec = tree_flatten((args, kwargs))
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if device != "cuda" and not any(isinstance(x, CudaTensor) for x in flat):
        return func(*args, **kwargs)
    copied_into = func.overloadpacket is aten.copy_ and not isinstance(args[0], CudaTensor)
    to_cpu = device == "cpu" or copied_into
    check(func, args, flat, to_cpu)

    host = [x.host if isinstance(x, CudaTensor) else x for x in flat]
    args, kwargs = tree_unflatten(host, spec)
    if device:
        kwargs["device"] = "cpu"
    func = wide_product if func in WIDE else func
    out = func(*args, **kwargs) if recording is None else record(func, args, kwargs)
    before = {id(x): y for x, y in zip(host, flat) if isinstance(x, torch.Tensor)}

    def on_cuda(x):
        return before[id(x)] if id(x) in before else CudaTensor(x)

    return out if to_cpu else tree_map_only(torch.Tensor, on_cuda, out)


def wide_product(a, b, dtype):
    """A product whose result is of another dtype, which only CUDA has."""
    return a.to(dtype) @ b.to(dtype)


def check(func, args, flat, to_cpu):
    """Raises Refused for what CUDA refuses of one operation, in which the GPU takes part."""
    packet, tensors = func.overloadpacket, [x for x in flat if isinstance(x, torch.Tensor)]
    strangers = [x for x in tensors if not isinstance(x, CudaTensor) and x.ndim]
    indices = [x for x in args[1] if x is not None] if packet in INDEXED else []
    if packet not in COPIES and any(all(x is not i for i in indices) for x in strangers):
        shapes = [tuple(x.shape) for x in strangers]
        raise Refused(f"{packet}: tensors on the GPU and on the CPU, the latter {shapes}")
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in flat):
        raise Refused(f"{packet}: a generator of the CPU for numbers on the GPU")
    if func in WIDE or packet is aten.native_layer_norm:
        if len({x.dtype for x in tensors}) > 1:
            raise Refused(f"{packet}: dtypes {[x.dtype for x in tensors]}")

    by_mask = any(x.dtype == torch.bool for x in indices)
    waits = packet in WAITS and func is not aten.repeat_interleave.self_int
    if recording is not None and (to_cpu or waits or by_mask):
        raise Refused(f"{packet}: the host waits for the GPU inside a captured graph")
    if recording is not None and strangers:
        raise Refused(f"{packet}: a copy from the CPU inside a captured graph")


def record(func, args, kwargs):
    """An operation inside a capture -> its results, whose numbers are not known yet."""
    if getattr(func, "_schema", None) and func._schema.is_mutable:
        recording.append((func, args, kwargs, []))
        return args[0]
    out = func(*args, **kwargs)  # for its shapes
    results = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    places = {x.untyped_storage()._cdata for x in inputs}
    if any(x.untyped_storage()._cdata not in places for x in results):  # no view
        recording.append((func, args, kwargs, results))
        for x in results:
            x.fill_(torch.nan if x.is_floating_point() else 0)
    return out


class CUDAGraph:
    """Operations that were captured; they write to where they wrote then."""

    def replay(self):
        for func, args, kwargs, results in self.operations:
            new = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
            for place, value in zip(results, new):
                place.copy_(value)


@contextlib.contextmanager
def graph(captured):
    """As `torch.cuda.graph`."""
    global recording
    recording = captured.operations = []
    try:
        yield
    finally:
        recording = None


# ------------------------------------------------------------------------------- functions of torch


class LowerRight(NamedTuple):
    """In place of torch's CausalBias, which cannot be made while a mode is on."""

    T: int
    length: int

    def mask(self, device):
        """(T, length): what each query sees."""
        rows = torch.arange(self.T, device=device)[:, None]
        return torch.arange(self.length, device=device) <= rows + self.length - self.T


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False, _real=F.scaled_dot_product_attention):  # fmt: skip
    """`scaled_dot_product_attention` as CUDA does it: scores and their softmax in fp32."""
    lower_right = isinstance(attn_mask, LowerRight)
    if not isinstance(query, CudaTensor):
        mask = attn_mask.mask("cpu") if lower_right else attn_mask
        more = dict(scale=scale, enable_gqa=enable_gqa)
        return _real(query, key, value, mask, dropout_p, is_causal, **more)
    if torch.is_autocast_enabled("cuda"):
        narrow = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(narrow) for x in (query, key, value))
    if len({x.dtype for x in (query, key, value)}) > 1:
        raise Refused(f"attention: dtypes {[x.dtype for x in (query, key, value)]}")
    (H, T), H_kv = query.shape[1:3], key.shape[1]
    if H != H_kv and not enable_gqa:
        raise Refused(f"attention: {H} and {H_kv} heads without enable_gqa")
    flash = query.element_size() == 2 and (attn_mask is None or lower_right)
    if not flash and not torch.backends.cuda.math_sdp_enabled():
        raise Refused("attention: no flash kernel takes a mask or fp32")
    if is_causal:
        attn_mask = LowerRight(T, T).mask("cuda")
    elif lower_right:
        attn_mask = attn_mask.mask("cuda")

    with torch.autocast("cuda", enabled=False):
        key, value = (x.repeat_interleave(H // H_kv, 1).float() for x in (key, value))
        score = query.float() @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            score = score.masked_fill(~attn_mask, -torch.inf)  # (..., T, length)
        elif attn_mask is not None:
            score = score + attn_mask
        weights = score.softmax(-1).to(query.dtype).float()
        return (weights @ value).to(query.dtype)


def tensor(data, *args, _real=torch.tensor, **kwargs):
    """`torch.tensor`, which cannot read tensors of a subclass in a list by itself."""
    if isinstance(data, (list, tuple)):
        data = [x.item() if isinstance(x, CudaTensor) and not x.ndim else x for x in data]
    return _real(data, *args, **kwargs)


def save_pretrained(
    self, folder, state_dict=None, _real=transformers.PreTrainedModel.save_pretrained, **kwargs
):
    """transformers' own; the file's writer wants to see where the numbers lie."""
    weights = self.state_dict() if state_dict is None else state_dict
    weights = {k: x.host if isinstance(x, CudaTensor) else x for k, x in weights.items()}
    return _real(self, folder, state_dict=weights, **kwargs)


def nothing(*args):
    """Of torch.cuda: what has no effect here."""


def begin():
    """From here on there is a GPU."""
    _device_constructors()  # a cache, of the real torch.tensor
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy, too
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to
    shared_prefix.causal_lower_right = LowerRight
    F.scaled_dot_product_attention, torch.tensor = attention, tensor
    transformers.PreTrainedModel.save_pretrained = save_pretrained
    for name, value in dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_name=lambda *args: "an emulated GPU",
        is_current_stream_capturing=lambda: recording is not None,
        get_rng_state=lambda *args: torch.get_rng_state(),
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
        max_memory_allocated=lambda *args: 2**20,
        max_memory_reserved=lambda *args: 2**21,
        memory_allocated=lambda *args: 2**20,
        mem_get_info=lambda *args: (80 * 10**9, 80 * 10**9),
        CUDAGraph=CUDAGraph,
        graph=graph,
        **dict.fromkeys(("set_device", "synchronize", "empty_cache", "manual_seed"), nothing),
        **dict.fromkeys(("manual_seed_all", "reset_peak_memory_stats", "_lazy_init"), nothing),
    ).items():
        setattr(torch.cuda, name, value)
    OnCuda().__enter__()


def pytest_configure(config):
    """Given with -p, before torch was imported."""
    if torch.__version__.partition("+")[0] != VERSION or not PRETENDED:
        raise SystemExit(f"the emulation needs torch {VERSION} without CUDA, and g++")
    begin()
