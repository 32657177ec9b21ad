"""What is alive at once, counted op by op."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that ops inside the block made and that are still there. What an op takes for itself while
    it runs is not seen.

    Attributes:
        peak: most bytes at once.
        largest: bytes of the largest storage.
        ops: names of the ops that ran.
        counted: most storages at once among those of at least `least` bytes.
    """

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.least, self.peak, self.largest, self.counted, self.ops = least, 0, 0, 0, set()
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.add(func.overloadpacket.__name__)
        given = {storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and storage(leaf)._cdata not in {*given, *self._live}:
                made = storage(leaf)
                self._live[made._cdata] = made.nbytes()
                weakref.finalize(made, self._live.pop, made._cdata, None)
                self.largest = max(self.largest, made.nbytes())
        self.peak = max(self.peak, sum(self._live.values()))
        self.counted = max(self.counted, sum(size >= self.least for size in self._live.values()))
        return result


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
