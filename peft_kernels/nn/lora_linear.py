"""`nn.Linear` with a low-rank adapter, computed by one fused op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..ops.lora_linear import lora_linear


class LoRALinear(nn.Linear):
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
        ValueError: for a rank below 1 or a dropout outside of [0, 1].
    """

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
            ValueError: if `linear` is no `nn.Linear`, or is a LoRALinear already.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, LoRALinear):
            raise ValueError(f"expected a plain nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)  # also None has to stand among the parameters
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, adapter_precision)
        return layer.train(linear.training)

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
        lora_alpha = r if lora_alpha is None else lora_alpha
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.adapter_precision = lora_dropout, adapter_precision
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        options = {"device": self.weight.device, "dtype": adapter_dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        # While merged: the base weight as it was, on its device. No part of the state_dict, but moved with it.
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.merged = False
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise lora_A and lora_B as PEFT does; the layer then computes what its base computes."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features]; dtypes and errors as :func:`peft_kernels.lora_linear`."""
        if self.merged:
            return super().forward(x)
        own = self._parameters  # a look-up through nn.Module.__getattr__ costs the host half a microsecond
        return lora_linear(
            x, own["weight"], own["lora_A"], own["lora_B"], self.scaling, own["bias"],
            dropout_p=self.lora_dropout, training=self.training, adapter_precision=self.adapter_precision,
        )  # fmt: skip

    @torch.no_grad()
    def merge(self) -> None:
        """Put W + scaling·B·A in place of the weight, as a new Parameter.

        The sum is computed in float32 (float64 for a float64 weight) and rounded once. The old weight is kept as
        it was, and where it was: in the buffer `unmerged_weight`, on the weight's device, at
        `weight.numel() * weight.element_size()` bytes, which `extra_repr` shows; others that share it keep it.

        Raises:
            RuntimeError: if the layer is merged already, or its scaling has one value a row.
        """
        if self.merged:
            raise RuntimeError("expected an unmerged layer, got one that is merged already")
        if isinstance(self.scaling, torch.Tensor) and self.scaling.dim():
            raise RuntimeError(f"expected one scaling to merge with, got {list(self.scaling.shape)}")
        weight = self.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.lora_B.to(wide) @ self.lora_A.to(wide) * self.scaling
        merged = nn.Parameter(delta.add_(weight).to(weight.dtype), requires_grad=weight.requires_grad)
        self.unmerged_weight, self.weight, self.merged = weight.detach(), merged, True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the old weight back, bit for bit.

        Raises:
            RuntimeError: if the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("expected a merged layer, got one that is not merged")
        self.weight = nn.Parameter(self.unmerged_weight, requires_grad=self.weight.requires_grad)
        self.unmerged_weight, self.merged = None, False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A checkpoint holds the base weight and the adapter, merged or not."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.unmerged_weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *others) -> None:
        """A checkpoint of a plain `nn.Linear` has no adapter: the layer keeps its own, and nothing is missing."""
        if self.merged:
            self.unmerge()
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *others)
        adapter = {prefix + "lora_A", prefix + "lora_B"}
        missing_keys += missing if adapter & state_dict.keys() else [key for key in missing if key not in adapter]

    def extra_repr(self) -> str:
        text = (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )  # fmt: skip
        if self.use_rslora:
            text += ", use_rslora=True"
        if self.merged:
            kept = self.unmerged_weight
            text += f", merged (base weight kept on {kept.device}, {kept.numel() * kept.element_size()} bytes)"
        return text
