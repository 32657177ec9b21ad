"""`nn.Linear` that trains a few of its weight's entries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.core.messages import describe
from ..ops.core.tensors import flatten
from ..ops.core.transforms import is_transformed, over_values, untraced
from ..ops.sparse_delta import SparseDelta, SparseLayout, with_sparse_gradient_, write_delta, written
from .checks import check_linear


def check_delta(delta: SparseDelta | SparseLayout, name: str, shape: tuple[int, int], where: str = "") -> None:
    """Raise ValueError unless a layer with a weight of this shape could have the delta under this name.

    Args:
        where: which layer, for the message.
    """
    if not isinstance(delta, (SparseDelta, SparseLayout)):
        raise ValueError(f"expected a SparseLayout or a SparseDelta{where}, got {type(delta).__name__}")
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"expected a name without dots, got {name!r}")
    layout = delta.layout if isinstance(delta, SparseDelta) else delta
    if layout.shape != tuple(shape):
        raise ValueError(f"expected a delta of {list(shape)}{where}, got {delta}")


class NamedDelta(nn.Module):
    """One of the deltas of a layer: what it adds to the weight, and where.

    Attributes:
        values: [nnz], float32 (float64 beside a float64 weight): Δ, the leaf that trains and the master.
        base: [nnz] in the weight's dtype: what the weight held at the positions before Δ, bit for bit; None while the
            delta is not in the weight.
    """

    def __init__(self, layout: SparseLayout, values: torch.Tensor) -> None:
        super().__init__()
        self.kind, self.shape, self.tile = layout.kind, layout.shape, layout.tile
        self.dtypes = {name: tensor.dtype for name, tensor in layout.tensors.items()}
        self._layout: tuple[torch.Tensor, SparseLayout] | None = None
        for name in self.dtypes:
            self.register_buffer(name, None)
        self.hold(layout)
        self.register_buffer("base", None)
        self.values = nn.Parameter(values)

    @property
    def layout(self) -> SparseLayout:
        """The layout of the buffers, made anew only where they are others (after a move): every forward asks for it."""
        held = [self._buffers[name] for name in self.dtypes]
        if self._layout is not None and self._layout[0] is held[0]:
            return self._layout[1]
        tensors = [tensor.view(dtype) for tensor, dtype in zip(held, self.dtypes.values())]
        layout = SparseLayout.of_tensors(self.kind, self.shape, tensors, self.tile)
        if not torch.compiler.is_compiling():
            self._layout = held[0], layout
        return layout

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layout": None}

    def hold(self, layout: SparseLayout) -> None:
        """Take over the tensors of a layout of the same kind and size."""
        for name, tensor in layout.tensors.items():  # DDP sends every buffer round, and knows no 16-bit integers
            self._buffers[name] = tensor.view(torch.uint8) if tensor.dtype == torch.int16 else tensor

    def _apply(self, fn, recurse=True):
        """Move with the layer, but keep the dtype of the values: half of a master would not be one."""
        before = self.values.data
        super()._apply(fn, recurse)
        after, grad = self.values.data, self.values.grad
        if after.dtype != before.dtype and not before.is_meta:
            wide = torch.promote_types(after.dtype, torch.float32)
            self.values.data = before.to(after.device, wide)
            self.values.grad = None if grad is None else grad.to(wide)
        return self

    def _load_from_state_dict(self, *args) -> None:
        """Load into new buffers: loading writes in place, and others may have the layout too."""
        self._buffers.update({name: self._buffers[name].clone() for name in self.dtypes})
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return repr(self.layout)


class SparseDeltaLinear(nn.Linear):
    """A linear layer whose weight is trained at the positions of a layout only: y = x·(W₀ + Δ)ᵀ + bias.

    It stands wherever an `nn.Linear` stood. Δ is **in** the weight, so that forward and dx are the bare linear. The
    trained Parameter is `values`. Any optimizer of torch can train it: a forward first writes W₀ + Δ into the weight
    wherever a step may have changed `values`. :class:`peft_kernels.optim.SparseAdamW` writes by itself, and forward has
    nothing to do then; under `torch.compile` every forward writes. Several named deltas may wait beside the one that is
    in the weight.

    DDP takes it as it is. FSDP2 would write Δ into a copy that it throws away: give `fully_shard` the weights as
    `ignored_params`.

    A trainable value costs 4 bytes of `values`, the weight's own of `base` and those of the layout, 8.1 in all for a
    bfloat16 weight and entries at 1 %; AdamW's two moments add 8. A frozen entry costs nothing.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        layout: positions in a weight [out_features, in_features].

    Attributes:
        weight: [out_features, in_features], W₀ + Δ rounded to its dtype; frozen, written in place.
        bias: [out_features] or None; frozen.
        deltas: :class:`NamedDelta` by name; `active` is the name of the one in the weight, or None.
        values, base, layout: of the active delta.

    Raises:
        ValueError: for a layout of another shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: SparseLayout,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin(layout, "default")

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, layout: SparseLayout | SparseDelta, name: str = "default"
    ) -> SparseDeltaLinear:
        """A layer around `linear`'s own weight and bias: the same Parameters, not copies, which are frozen. The weight
        will be written to: who else holds it sees Δ too, until `restore()`. A layout begins at Δ = 0.

        Raises:
            ValueError: if `linear` is no `nn.Linear`, is one of these already, or has a weight that is no plain
                floating-point tensor, such as a quantised one; for a layout of another shape. Nothing is changed then.
        """
        check_linear(linear, SparseDeltaLinear, written=True)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)  # also None has to stand among the parameters
        layer._begin(layout, name)
        return layer.train(linear.training)

    def _begin(self, delta: SparseLayout | SparseDelta, name: str) -> None:
        self.deltas = nn.ModuleDict()
        self.active: str | None = None
        self._written: tuple | None = None  # changes with what was written, and where
        self._trained = False  # a training forward since a step that writes, or none: then nothing is certain
        self.add_delta(name, delta)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.apply_delta(name)

    @property
    def values(self) -> nn.Parameter:
        return self._in_weight().values

    @property
    def base(self) -> torch.Tensor:
        return self._in_weight().base

    @property
    def layout(self) -> SparseLayout:
        return self._in_weight().layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features], as `F.linear`, also under autocast."""
        if x.is_nested:
            return over_values("SparseDeltaLinear", self.forward, x)
        own = self._parameters  # a look-up through nn.Module.__getattr__ costs the CPU half a microsecond
        weight, bias = own["weight"], own["bias"]
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for the product and for what is saved
        if self.active is None:
            return self.product(x, weight, bias)
        delta = self._modules["deltas"]._modules[self.active]
        values = delta._parameters["values"]
        if is_transformed():
            return self.product(x, self._written_apart(weight, delta), bias)
        self.write()
        if not (torch.is_grad_enabled() and values.requires_grad):
            return self.product(x, weight, bias)
        self._trained = True  # a step may follow, and one of torch's fused optimizers leaves no trace
        # The product takes rows: with leading dims y would be a view, whose gradient torch copies, to see writes to it.
        rows = flatten(x)
        y = with_sparse_gradient_(self.product(rows, weight, bias), rows, values, delta.layout)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    def _written_apart(self, weight: torch.Tensor, delta: NamedDelta) -> torch.Tensor:
        """Return W₀ + Δ in a copy where torch differentiates, batches or traces its values: what a transform wraps
        cannot be written into the weight. A traced graph of values that are frozen reads the weight itself."""
        values = delta._parameters["values"]
        if torch.jit.is_tracing() and not values.requires_grad:  # torch checks a trace without gradients
            with untraced():
                self.write()
            return weight
        return written(weight, delta._buffers["base"], values, delta.layout)

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return y [..., N] of x [..., K] and the weight with Δ in it, for subclasses that add to it; no view of x."""
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def write(self, changed: bool = False, done: bool = False) -> None:
        """Write W₀ + Δ into the weight, unless it is known to be there. A forward calls this.

        Args:
            changed: `values` are others than before, though their version may not show it, as after `values.data` was
                written to. All forwards until the next in training then rely on what is written now.
            done: whoever changed them has written the weight, too.
        """
        if self.active is None:
            return
        weight, delta = self._parameters["weight"], self._modules["deltas"]._modules[self.active]
        values, base = delta._parameters["values"], delta._buffers["base"]
        if torch.compiler.is_compiling():  # a graph cannot ask
            write_delta(weight, base, values, delta.layout)
            return
        stamp = (self.active, values._version, values.data_ptr(), weight.data_ptr())
        seen = changed or stamp != self._written
        if not seen and not self._trained and not _capturing(weight):
            return
        self._written = None  # until it is: this can be interrupted
        # The same numbers as before, maybe: a backward that is still to come may go on with the weight that it saved.
        if not done:
            write_delta(weight.data, base, values, delta.layout)
        if seen:
            torch.autograd.graph.increment_version(weight)
        self._written, self._trained = stamp, self._trained and not changed

    def add_delta(self, name: str, delta: SparseDelta | SparseLayout) -> None:
        """Add a delta, or an empty one (Δ = 0) at the positions of a layout; it does not go into the weight yet.

        Raises:
            ValueError: the name is taken or no name of a module, the shape another than the weight's.
        """
        if name in self.deltas:
            raise ValueError(f"expected a new name, got {name!r}, which the layer has")
        check_delta(delta, name, self.weight.shape)
        if isinstance(delta, SparseLayout):
            delta = SparseDelta(delta, torch.zeros(delta.nnz, device=delta.device))
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        values = delta.values.detach().to(self.weight.device, wide, copy=True)
        self.deltas[name] = NamedDelta(delta.layout.to(self.weight.device), values)

    def remove_delta(self, name: str) -> SparseDelta:
        """Take a delta away, out of the weight too if it is there, and return it.

        Raises:
            ValueError: there is no such delta.
        """
        delta = self.delta(name)
        if name == self.active:
            self.restore()
        del self.deltas[name]
        return delta

    def delta(self, name: str | None = None) -> SparseDelta:
        """Return the delta of that name, or the active one: its layout and its present values, detached, not copied.

        Raises:
            ValueError: there is no such delta.
        """
        found = self._in_weight() if name is None else self._named(name)
        return SparseDelta(found.layout, found.values.detach())

    @torch.no_grad()
    def apply_delta(self, name: str) -> None:
        """Put that delta into the weight instead of the one that is there.

        Raises:
            ValueError: there is no such delta; nothing is changed then.
        """
        delta = self._named(name)
        if name != self.active:
            self.restore()
            delta.base = delta.layout.take(self.weight)
            self.active = name
        self.write()

    @torch.no_grad()
    def restore(self) -> None:
        """Put W₀ back into the weight, bit for bit. The deltas stay, `apply_delta` brings one back."""
        if self.active is not None:
            delta, self._written = self.deltas[self.active], None
            delta.layout.put_(self.weight, delta.base)
            delta.base, self.active = None, None

    @torch.no_grad()
    def move_delta(self, layout: SparseLayout, values: torch.Tensor) -> None:
        """Move the active delta to a layout of the same kind and size; the Parameter, and what an optimizer knows of
        it, stay. For methods that drop and grow entries while they train.

        Raises:
            ValueError: a layout of another kind, shape or number of values; nothing is changed then.
        """
        name, old = self.active, self.layout
        sizes = [tensor.shape for tensor in layout.tensors.values()]
        if (layout.kind, layout.shape, layout.tile) != (old.kind, old.shape, old.tile) or sizes != [
            tensor.shape for tensor in old.tensors.values()
        ]:
            raise ValueError(f"expected a layout as {old}, got {layout}")
        if values.shape != (layout.nnz,):
            raise ValueError(f"expected values [{layout.nnz}], got {describe(values)}")
        self.restore()
        self.deltas[name].hold(layout.to(self.weight.device))
        self.deltas[name].values.copy_(values)
        self.apply_delta(name)

    def merge(self) -> nn.Linear:
        """Return a plain `nn.Linear` with W₀ + Δ: this layer's weight and bias, not copies."""
        self.write()
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _named(self, name: str) -> NamedDelta:
        if name not in self.deltas:
            raise ValueError(f"expected one of the deltas {', '.join(self.deltas) or '(none)'}, got {name!r}")
        return self.deltas[name]

    def _in_weight(self) -> NamedDelta:
        if self.active is None:
            raise RuntimeError("expected a delta in the weight, got none: apply_delta(name) brings one back")
        return self.deltas[self.active]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save a weight that holds Δ: a plain `nn.Linear` that loads it is the trained layer."""
        self.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *others) -> None:
        """Load a checkpoint of this layer, its weight with the delta that was in it, or one of a plain `nn.Linear`: W₀,
        beside which the deltas stay as they are."""
        own = f"{prefix}deltas."
        active = self.active
        if f"{prefix}weight" not in state_dict:  # it holds only what trains: the next forward writes the weight
            self._written = None
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *others)
            return
        if not any(key.startswith(own) for key in state_dict):
            self.restore()
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *others)
            if active is not None:
                self.apply_delta(active)
            state_dict.update(self.deltas.state_dict(prefix=own))  # which the modules below will look for
            return
        held = next((name for name in self.deltas if f"{own}{name}.base" in state_dict), None)
        if held != active:
            self.restore()
            if held is not None:
                self.deltas[held].base = self.deltas[held].layout.take(self.weight)
        self.active, self._written = held, None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *others)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, delta in the weight: {self.active or 'none'}"


def _capturing(tensor: torch.Tensor) -> bool:
    """Return whether a CUDA graph is captured, which has to hold what later replays need."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
