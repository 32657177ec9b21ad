"""`nn.Linear` with a learned scale of its output or input features, computed by one fused op."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.scaled_linear import scaled_linear
from .adapted_linear import AdaptedLinear


class ScaledLinear(AdaptedLinear):
    """A linear layer scaled as (IA)³ has it (Liu et al., 2022, §3.3): y = (x·Wᵀ + bias) ⊙ l, or with `scale_input`
    y = (x ⊙ l)·Wᵀ + bias.

    It stands wherever an `nn.Linear` stood: it is one, it loads its checkpoints, and with l = 1, as it starts, it
    computes the same. Weight and bias are frozen, `scale` trains. The paper scales the output of the keys' and values'
    projections, and the input of the feed-forward's second one.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        scale_input: scale x instead of the output.
        adapter_dtype: of `scale`; `dtype` by default, float32 for PEFT's habit beside a 16-bit base.

    Attributes:
        weight: [out_features, in_features]; while merged, its rows or, with `scale_input`, its columns times l.
        bias: [out_features] or None; while merged without `scale_input`, times l.
        scale: l, [out_features], or [in_features] with `scale_input`; ones.

    Raises:
        ValueError: for an adapter's dtype that does not fit.
    """

    adapter = ("scale",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale_input: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapter(scale_input, adapter_dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scale_input: bool = False, *, adapter_dtype: torch.dtype | None = None
    ) -> ScaledLinear:
        """A layer around `linear`'s own weight and bias: the same Parameters, not copies, which are frozen.

        Raises:
            ValueError: if `linear` is no `nn.Linear`, is a ScaledLinear already, or has a weight that is no plain
                floating-point tensor, such as a quantised one; nothing is changed then.
        """
        layer = cls._around(linear)
        layer._add_adapter(scale_input, adapter_dtype)
        return layer

    def _add_adapter(self, scale_input: bool, adapter_dtype: torch.dtype | None) -> None:
        self.scale_input = scale_input
        self._add(adapter_dtype, scale=(self.in_features if scale_input else self.out_features,))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Set the scale to ones: the layer then computes what its base computes."""
        nn.init.ones_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features]; dtypes and errors as :func:`peft_kernels.scaled_linear`."""
        if self.merged:
            return super().forward(x)
        own = self._parameters  # a look-up through nn.Module.__getattr__ costs the CPU half a microsecond
        return scaled_linear(x, own["weight"], own["scale"], own["bias"], scale_input=self.scale_input)

    def _merged_parameters(self) -> dict[str, torch.Tensor]:
        scale = self.scale.to(torch.promote_types(self.weight.dtype, torch.float32))
        if self.scale_input:
            return {"weight": self.weight * scale}
        merged = {"weight": self.weight * scale[:, None]}
        return merged if self.bias is None else merged | {"bias": self.bias * scale}

    def extra_repr(self) -> str:
        return super().extra_repr() + ", scale_input=True" * self.scale_input
