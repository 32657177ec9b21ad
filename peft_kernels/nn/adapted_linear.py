"""The base class of linear layers with an adapter: they are made around a linear layer, merged into its weight and
taken out again, saved and loaded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .checks import check_linear


class AdaptedLinear(nn.Linear):
    """A linear layer whose weight and bias are frozen, with an adapter beside them that can be merged.

    It stands wherever an `nn.Linear` stood: it is one, and it loads its checkpoints. A subclass names the parameters of
    its adapter, adds them, and says what the layer's own become when it is merged.
    """

    #: Names of the adapter's parameters.
    adapter: ClassVar[tuple[str, ...]]

    @classmethod
    def _around(cls, linear: nn.Linear) -> AdaptedLinear:
        """Make a layer with `linear`'s own weight and bias, not copies, and no adapter yet.

        Raises:
            ValueError: if `linear` is no `nn.Linear`, is of this class already, or has a weight that is no plain
                floating-point tensor, such as a quantised one; nothing is changed then.
        """
        check_linear(linear, cls)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)  # also None has to stand among the parameters
        return layer.train(linear.training)

    def _add(self, adapter_dtype: torch.dtype | None, **shapes: tuple[int, ...]) -> None:
        """Freeze weight and bias, and add the adapter's parameters, of these shapes, beside them.

        Raises:
            ValueError: for an `adapter_dtype` that is neither the weight's nor float32 beside a 16-bit weight.
        """
        dtype = self.weight.dtype
        if adapter_dtype not in (None, dtype, torch.float32 if dtype.itemsize == 2 else dtype):
            expected = f"the weight's, {dtype}" + ", or torch.float32" * (dtype.itemsize == 2)
            raise ValueError(f"expected an adapter_dtype as {expected}, got {adapter_dtype}")
        for name, shape in shapes.items():
            values = torch.empty(shape, device=self.weight.device, dtype=adapter_dtype or dtype)
            setattr(self, name, nn.Parameter(values))
        # While merged: weight and bias as they were, on their device. No part of the state_dict, but moved with it.
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.register_buffer("unmerged_bias", None, persistent=False)
        self.merged = False
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _merged_parameters(self) -> dict[str, torch.Tensor]:
        """Return by name what weight and bias become when the layer is merged: those that change, in float32 or wider.

        Raises:
            RuntimeError: if this adapter cannot be merged.
        """
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into the weight (and the bias, where it changes that), as new Parameters.

        The sum is computed in float32 (float64 for a float64 weight) and rounded once. The old values stay, bit for
        bit, in the buffers `unmerged_weight` and `unmerged_bias` on the weight's device, at as many bytes, which
        `extra_repr` shows; other layers that share the old Parameter keep it.

        Raises:
            RuntimeError: if the layer is merged already, or cannot be merged.
        """
        if self.merged:
            raise RuntimeError("expected an unmerged layer, got one that is merged already")
        for name, values in self._merged_parameters().items():
            own = getattr(self, name)
            setattr(self, f"unmerged_{name}", own.detach())
            setattr(self, name, nn.Parameter(values.to(own.dtype), requires_grad=own.requires_grad))
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the old weight and bias back, bit for bit.

        Raises:
            RuntimeError: if the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("expected a merged layer, got one that is not merged")
        for name, values in self._unmerged().items():
            setattr(self, name, nn.Parameter(values, requires_grad=getattr(self, name).requires_grad))
            setattr(self, f"unmerged_{name}", None)
        self.merged = False

    def _unmerged(self) -> dict[str, torch.Tensor]:
        both = {"weight": self.unmerged_weight, "bias": self.unmerged_bias}
        return {name: values for name, values in both.items() if values is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the base's parameters and the adapter, merged or not."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, values in self._unmerged().items():
            destination[prefix + name] = values

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *others) -> None:
        """Load a checkpoint; one of a plain `nn.Linear` has no adapter: the layer keeps its own and misses nothing."""
        if self.merged:
            self.unmerge()
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *others)
        adapter = {prefix + name for name in self.adapter}
        missing_keys += missing if adapter & state_dict.keys() else [key for key in missing if key not in adapter]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.merged:
            saved = self._unmerged().values()
            size = sum(values.numel() * values.element_size() for values in saved)
            text += f", merged (base weight kept on {self.unmerged_weight.device}, {size} bytes)"
        return text
