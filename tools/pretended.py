"""A GPU that is not there: tensors with a shape, a dtype and a device, and almost no numbers.

PyTorch's FakeTensorMode runs real code on tensors that hold no memory, so an 8B fits a laptop.
`PretendedGPU` adds what a rehearsal wants to know:

* Integers and booleans keep their numbers, because lengths, masks and positions decide which code
  runs. What depends on floats has none: where the host asks for such a number it is told 0.
* A ledger of every storage that is made and freed, so that the peak and its parts are known.
* FLOPs, kernels, and each place where the host waits for a number from the GPU.

PyTorch without CUDA refuses a backward on a CUDA device until somebody says how to switch to it.
Thirty lines of C++ say that there is nothing to switch. Without a compiler the tensors are called
"cpu": bytes and FLOPs are the same, kernels and waits are then not counted.

It cannot see what a kernel does: its speed, the shapes it refuses, its workspace, fragments.
This uses private parts of torch 2.13. Source: ours.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEVICE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
constexpr auto CUDA = DeviceType::CUDA;
struct Guard : impl::NoOpDeviceGuardImpl<CUDA> {
  Device getDevice() const override { return {CUDA, 0}; }
  Device exchangeDevice(Device) const override { return {CUDA, 0}; }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, {CUDA, 0});
  }
};
struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
using at::CUDAHooksRegistry, at::CUDAHooksArgs, at::CUDAHooksInterface;
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
extern "C" void pretend() {
  impl::device_guard_impl_registry[(size_t)CUDA].store(new Guard());
}
"""


def pretend_cuda():
    """Before torch is imported: one that has no CUDA will believe in a GPU -> whether it does.

    Needs g++ once; the library is kept in ~/.cache and knows no folder of torch, because several
    environments may share it.
    """
    torch_folder = os.path.dirname(importlib.util.find_spec("torch").origin)
    built_for_cuda = os.path.exists(os.path.join(torch_folder, "lib", "libtorch_cuda.so"))
    if "torch" in sys.modules or built_for_cuda or not shutil.which("g++"):
        return False
    if "--shard" in sys.argv:  # FSDP wants streams, which only a real CUDA has
        return False
    name = f"pretended_gpu-{importlib.metadata.version('torch')}.so"
    library = os.path.join(os.path.expanduser("~/.cache/future_l1"), name)
    lib = os.path.join(torch_folder, "lib")
    if not os.path.exists(library):
        os.makedirs(os.path.dirname(library), exist_ok=True)
        include = os.path.join(torch_folder, "include")
        command = ["g++", "-x", "c++", "-", "-shared", "-fPIC", "-std=c++20", f"-I{include}"]
        command += [f"-I{include}/torch/csrc/api/include", f"-L{lib}", "-lc10", "-ltorch_cpu"]
        command += ["-o", f"{library}.{os.getpid()}"]
        subprocess.run(command, input=DEVICE, text=True, check=True)
        os.replace(f"{library}.{os.getpid()}", library)
    for needed in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(os.path.join(lib, needed))
    ctypes.CDLL(library).pretend()
    return True


PRETENDED = pretend_cuda()

import torch  # noqa: E402
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from common import shared_prefix
from model import FutureL1  # noqa: F401  transformers is imported before anything is pretended

aten = torch.ops.aten
HAS_CUDA = PRETENDED or torch.cuda.is_available()
if PRETENDED:
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True


# --------------------------------------------------------------------------------------- the ledger


class Ledger:
    """Every storage that was made or freed, in order: what was there when most was there?"""

    def __init__(self):
        self.events, self.kind, self.size = [], {}, {}  # events: (number of a storage, bytes more)
        self.number = WeakIdKeyDictionary()

    def add(self, tensor, kind):
        """Enter a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage not in self.number and storage.nbytes():
            number = len(self.events)
            self.number[storage], self.kind[number], self.size[number] = number, kind, 0
            self.resize(number, storage.nbytes())
            weakref.finalize(storage, self.resize, number, 0)

    def resize(self, number, size):
        """A storage has another size from now on."""
        size = -(-size // 512) * 512  # as CUDA's allocator rounds
        self.events.append((number, size - self.size[number]))
        self.size[number] = size

    def of(self, tensor):
        """What a tensor is; None if it was never entered."""
        return self.kind.get(self.number.get(tensor.untyped_storage()))

    def peak(self, since=0):
        """The largest number of live bytes from event `since` on -> {kind: bytes} at that time."""
        live = most = best = 0
        for i, (_, size) in enumerate(self.events):
            live += size
            if i >= since - 1 and live > most:
                most, best = live, i
        parts = Counter()
        for number, size in self.events[: best + 1]:
            parts[self.kind[number]] += size
        return {kind: size for kind, size in parts.items() if size}


# ------------------------------------------------------------------------------------------ the GPU

# functions for which the host has to know numbers, and which of their arguments hold these
LOOKS = {aten._local_scalar_dense: 0, aten.nonzero: 0, aten.bincount: 0, aten.equal: 0}
LOOKS |= {aten._unique2: 0, aten.repeat_interleave: 0}
NO_KERNEL = set(
    "view _unsafe_view reshape transpose t permute expand slice select unsqueeze squeeze unbind "
    "split split_with_sizes detach alias as_strided lift_fresh empty empty_like empty_strided "
    "new_empty unfold diagonal _reshape_alias".split()
)
ONE_DTYPE = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten.index_copy_)


@register_flop_formula(aten._grouped_mm)
def grouped_flops(a, b, *args, out_shape=None, **kwargs):
    """Of experts: rows a (S, K), each with its expert's matrix of b (E, K, N); or a gradient."""
    return 2 * a[0] * a[1] * b[-1]


class PretendedGPU(TorchDispatchMode):
    """Inside, tensors are fake; `ledger`, `flops`, `kernels`, `looks`, `attention` say what ran."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.fake, self.numbers = FakeTensorMode(allow_non_fake_inputs=True), WeakIdKeyDictionary()
        self.ledger, self.kind = Ledger(), "activations"
        self.begin()

    def begin(self):
        """Count from here on."""
        self.since, self.flops = len(self.ledger.events), 0
        self.kernels, self.looks, self.attention = Counter(), Counter(), Counter()

    def __enter__(self):
        _device_constructors()  # a cache, of the real torch.tensor
        self.inside = contextlib.ExitStack()
        for place, name, value in (
            (torch, "tensor", self.tensor),
            (torch.UntypedStorage, "resize_", lambda x, size: self.resize(x, size)),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "get_device_capability", lambda *args: (9, 0)),  # an H100's
            # also where the device is called "cpu": code takes CUDA's way
            (FakeTensor, "is_cuda", True),
            (FakeTensor, "tolist", lambda x: self.tolist(x)),
            (F, "scaled_dot_product_attention", self.attend),
            (
                shared_prefix,
                "causal",
                lambda q, k, v, s: self.attend(q, k, v, is_causal=True, scale=s),
            ),
            # as CUDA's: one kernel, which keeps its input; fake tensors have that of layer_norm
            (F, "rms_norm", lambda x, shape, w, eps: F.layer_norm(x, shape, w, None, eps)),
        ):
            self.inside.enter_context(mock.patch.object(place, name, value))
        self.inside.enter_context(self.fake)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.inside.__exit__(*error)

    # ---- numbers

    def number(self, x):
        """The real tensor behind x; None if there is none."""
        return self.numbers.get(x) if isinstance(x, FakeTensor) else x

    def told(self, x):
        """What the host is told when it asks: the numbers of x, 0 where nobody knows them."""
        if self.number(x) is None:
            with _disable_current_modes():
                self.numbers[x] = torch.zeros(x.shape, dtype=x.dtype)
        return self.number(x)

    def tolist(self, x):
        self.look(x)
        with _disable_current_modes():
            return self.told(x).tolist()

    def tensor(self, data, _real=torch.tensor, **kwargs):
        """`torch.tensor`, which cannot ask fake tensors in a list for their numbers."""
        if isinstance(data, list):
            data = [x.item() if isinstance(x, FakeTensor) and x.ndim == 0 else x for x in data]
        return _real(data, **kwargs)

    def resize(self, storage, size, _real=torch.UntypedStorage.resize_):
        """FSDP frees what it gathered by giving its storage the size 0."""
        if storage in self.ledger.number:
            self.ledger.resize(self.ledger.number[storage], size)
        return _real(storage, size)

    def look(self, x):
        """The host waits for a number of x, if that is on the GPU."""
        if x.device.type == self.device:
            self.looks[where()] += 1

    def known(self, real, device):
        """A real tensor -> a fake one on the device, whose numbers are known."""
        like = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
        self.numbers[like] = real
        self.ledger.add(like, self.kind)
        return like

    # ---- one operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # it takes itself apart first
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        packet = func.overloadpacket
        if packet in LOOKS and func is not aten.repeat_interleave.self_int:
            return self.ask(func, args, kwargs)
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            args = (args[0], [*self.places(args[1])], *args[2:])  # masks -> numbers of places
            flat, spec = tree_flatten((args, kwargs))
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if packet is aten._to_copy and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.look(args[0])
        if packet in ONE_DTYPE and len({x.dtype for x in tensors if x.is_floating_point()}) > 1:
            raise TypeError(f"{packet} of {[x.dtype for x in tensors]} at {where()}")

        if packet is aten.add and adds_up_gradients(tensors):
            func = aten.add_.Tensor  # autograd adds in place, but not to tensors of a subclass
        out = func(*args, **kwargs)
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        self.compute(func, flat, spec, tensors, outs)
        self.count(packet, tensors, outs, args, kwargs, out)
        return out

    def ask(self, func, args, kwargs):
        """An operation whose result's shape, or itself, depends on numbers."""
        deciding = args[LOOKS[func.overloadpacket]]
        self.look(deciding)
        real_args = [self.told(x) if isinstance(x, torch.Tensor) else x for x in args]
        with _disable_current_modes():
            out = func(*real_args, **kwargs)
        return tree_map_only(torch.Tensor, lambda x: self.known(x, deciding.device), out)

    def places(self, indices):
        """Indices, masks among them -> indices alone."""
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found = [index]
            else:
                self.look(index)
                mask = self.told(index)
                with _disable_current_modes():
                    found = mask.nonzero(as_tuple=True)
                found = [self.known(x, index.device) for x in found]
            yield from found

    def compute(self, func, flat, spec, tensors, outs):
        """Numbers of the results, where they are integers and those of the inputs are known."""
        known = all(self.number(x) is not None for x in tensors)
        if not known or any(x.is_floating_point() for x in outs):
            for x in outs:
                self.numbers.pop(x, None)  # written in place
            return
        real = [self.number(x) if isinstance(x, torch.Tensor) else x for x in flat]
        args, kwargs = tree_unflatten(real, spec)
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        with _disable_current_modes():
            result = func(*args, **kwargs)
        results = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        for x, value in zip(outs, results):
            self.numbers[x] = value

    def count(self, packet, tensors, outs, args, kwargs, out):
        """Bytes, FLOPs and kernels of one operation."""
        on_gpu = [x for x in outs if isinstance(x, FakeTensor) and x.device.type == self.device]
        copy = packet is aten._to_copy and self.ledger.of(args[0]) == "weights"
        copy = copy and self.kind == "activations"  # autocast's; else weights are being made
        for x in on_gpu:
            self.ledger.add(x, "copies" if copy else self.kind)
        if packet in flop_registry:
            if packet in (aten.mm, aten.bmm):
                args, kwargs = args[:2], {}  # without the dtype of the result
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        if on_gpu and packet.__name__ not in NO_KERNEL:
            self.kernels[packet.__name__] += 1

    # ---- attention

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
               enable_gqa=False):  # fmt: skip
        """scaled_dot_product_attention by the kernel that CUDA takes: flash, or plain products.

        is_causal: from the lower right.
        """
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (x.bfloat16() for x in (query, key, value))
        if query.element_size() == 2 and attn_mask is None and query.shape[-1] <= 256:
            self.attention["flash"] += 1
            d = query.shape[-1]
            if d % 8:
                query, key, value = (F.pad(x, (0, -d % 8)) for x in (query, key, value))
            settings = dict(scale=scale or d**-0.5)
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, **settings)[0][..., :d]
        self.attention["products"] += 1
        settings = dict(scale=scale, enable_gqa=query.shape[1] != key.shape[1])
        products = aten._scaled_dot_product_attention_math
        return products(query, key, value, attn_mask, dropout_p, False, **settings)[0]


def adds_up_gradients(tensors):
    """Whether a sum of `tensors` is that of two gradients of one tensor, in a backward."""
    in_backward = torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()
    return in_backward and len({(x.shape, x.dtype) for x in tensors}) == 1 < len(tensors)


def where():
    """file:line of this project's innermost frame."""
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(ROOT + os.sep) and ".venv" not in name and name != __file__:
            return f"{os.path.relpath(name, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "in a backward"
