"""`nn.Linear` with a low-rank adapter, computed by one fused op."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..ops.lora_linear import lora_linear
from .adapted_linear import AdaptedLinear


class LoRALinear(AdaptedLinear):
    """A linear layer with a LoRA adapter (Hu et al., 2021): y = x·Wᵀ + bias + scaling · (D(x)·Aᵀ)·Bᵀ.

    It stands wherever an `nn.Linear` stood: it is one, it loads its checkpoints, and with B = 0, as it starts,
    it computes the same. Weight and bias are frozen, lora_A and lora_B train.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        r: the rank, at least 1.
        lora_alpha: numerator of the scaling; r by default, that is a scaling of 1.
        lora_dropout: probability of dropping an element of x before the adapter, in training.
        use_rslora: scaling = lora_alpha / √r (Kalajdzievski, 2023) instead of lora_alpha / r.
        adapter_dtype: of lora_A and lora_B; `dtype` by default, float32 for PEFT's habit beside a 16-bit base.
        adapter_precision: "default" or "high", as :func:`peft_kernels.lora_linear` has it.

    Attributes:
        weight: [out_features, in_features]; while merged, W + scaling·B·A.
        bias: [out_features] or None.
        lora_A: [r, in_features], Kaiming-uniform with a = √5, as PEFT. lora_B: [out_features, r], zeros.
        scaling: a float, or any scaling that the op takes.

    Raises:
        ValueError: for a rank below 1, a dropout outside of [0, 1], an adapter's dtype or precision that do not fit.
    """

    adapter = ("lora_A", "lora_B")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
        adapter_precision: str = "default",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, adapter_precision)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        adapter_dtype: torch.dtype | None = None,
        adapter_precision: str = "default",
    ) -> LoRALinear:
        """A layer around `linear`'s own weight and bias: the same Parameters, not copies, which are frozen
        (`requires_grad` becomes False, as PEFT does). The adapter is made on their device.

        Raises:
            ValueError: if `linear` is no `nn.Linear`, is a LoRALinear already, or has a weight that is no plain
                floating-point tensor, such as a quantised one; nothing is changed then.
        """
        layer = cls._around(linear)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, adapter_precision)
        return layer

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float | None,
        lora_dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        adapter_precision: str,
    ) -> None:
        if r < 1:
            raise ValueError(f"expected a rank r of at least 1, got {r}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"expected lora_dropout between 0 and 1, got {lora_dropout}")
        if adapter_precision not in ("default", "high"):
            raise ValueError(f"expected adapter_precision 'default' or 'high', got {adapter_precision!r}")
        self._add(adapter_dtype, lora_A=(r, self.in_features), lora_B=(self.out_features, r))
        lora_alpha = r if lora_alpha is None else lora_alpha
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.adapter_precision = lora_dropout, adapter_precision
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise lora_A and lora_B as PEFT does; the layer then computes what its base computes."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features]; dtypes and errors as :func:`peft_kernels.lora_linear`."""
        if self.merged:
            return super().forward(x)
        own = self._parameters  # a look-up through nn.Module.__getattr__ costs the CPU half a microsecond
        return lora_linear(
            x, own["weight"], own["lora_A"], own["lora_B"], self.scaling, own["bias"],
            dropout_p=self.lora_dropout, training=self.training, adapter_precision=self.adapter_precision,
        )  # fmt: skip

    def _merged_parameters(self) -> dict[str, torch.Tensor]:
        if isinstance(self.scaling, torch.Tensor) and self.scaling.dim():
            raise RuntimeError(f"expected one scaling to merge with, got {list(self.scaling.shape)}")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B.to(wide) @ self.lora_A.to(wide) * self.scaling
        return {"weight": delta.add_(self.weight)}

    def extra_repr(self) -> str:
        text = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return f"{super().extra_repr()}, {text}{', use_rslora=True' * self.use_rslora}"
