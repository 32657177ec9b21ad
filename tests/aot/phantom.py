"""A GPU that is not there, and tensors on it: shapes, strides, dtypes and addresses, no values. Launchers run on them,
and what they pass to Triton is what they would pass on that GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget


class Gpu(NamedTuple):
    """What a launcher asks of a GPU. `index` of its device: none that a machine has, since both torch's and our answers
    are kept by device."""

    name: str
    index: int
    target: GPUTarget
    processors: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)


#: With the processors of an A100, an H200, a B200 and an MI300X.
GPUS = {
    80: Gpu("sm_80", 80, GPUTarget("cuda", 80, 32), 108),
    90: Gpu("sm_90", 90, GPUTarget("cuda", 90, 32), 132),
    100: Gpu("sm_100", 100, GPUTarget("cuda", 100, 32), 148),
    "gfx942": Gpu("gfx942", 94, GPUTarget("hip", "gfx942", 64), 304),
}


class Phantom(torch.Tensor):
    """A tensor of `like`'s shape, strides and dtype on a GPU that is not there. Operations give phantoms; whoever asks
    for a value is refused by the meta tensor that stands behind it."""

    @staticmethod
    def __new__(cls, like: torch.Tensor, device: torch.device) -> Phantom:
        # For C++ it lies on the meta device, as a torch without CUDA can do nothing with another one.
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype,
            device="meta", requires_grad=like.requires_grad,
        )  # fmt: skip
        made._meta, made._gpu = like.detach().to("meta"), torch.device(device)
        return made

    device = property(lambda self: self._gpu)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def data_ptr(self) -> int:
        """Aligned as torch's allocator aligns, and never 0; all storages begin at the same address."""
        return 512 + self._meta.storage_offset() * self._meta.element_size()

    def __repr__(self, **_: Any) -> str:
        return f"Phantom({list(self.shape)}, strides {list(self.stride())}, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        device = device or next(leaf.device for leaf in leaves if isinstance(leaf, Phantom))
        if device.type != "cuda":
            raise RuntimeError(f"{func} copies what a kernel would have to compute to {device}")
        if func is torch.ops.aten.mm.dtype:  # for which torch has no meta kernel
            left, right, dtype = args
            return left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
        args, kwargs = tree_map(_to_meta, (args, kwargs or {}))
        return _to_phantom(func(*args, **kwargs), device)


class _Factories(TorchFunctionMode):
    """Makes a phantom of what is made on a GPU from nothing or from a tensor of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            return args[0]
        devices = [leaf for leaf in tree_leaves((args, kwargs)) if _is_gpu(leaf)]
        if func is torch.device or Phantom in types or not devices:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_to_meta, (args, kwargs))
        return _to_phantom(func(*args, **kwargs), torch.device(devices[0]))


def _is_gpu(leaf: Any) -> bool:
    return isinstance(leaf, (torch.device, str)) and str(leaf).startswith("cuda")


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf._meta if isinstance(leaf, Phantom) else leaf.to("meta")
    return torch.device("meta") if isinstance(leaf, torch.device) or _is_gpu(leaf) else leaf


def _to_phantom(result: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: Phantom(leaf, device) if isinstance(leaf, torch.Tensor) else leaf, result)


@contextlib.contextmanager
def present(gpu: Gpu) -> Iterator[None]:
    """Inside the block torch answers for this GPU, and `device=gpu.device` makes phantoms."""
    amd = gpu.target.backend == "hip"
    properties = SimpleNamespace(name=gpu.name, multi_processor_count=gpu.processors)
    answers = {
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: divmod(gpu.target.arch, 10),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(torch.version, "hip", "7.0" if amd else None),
        _Factories(),
    ):
        yield
