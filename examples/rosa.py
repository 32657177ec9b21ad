"""RoSA (Nikdan et al., "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation", 2024): a sparse and a
low-rank delta in one layer. The sparse one stands in the weight, so the layer is one LoRA linear op, and dy and x serve
both gradients.

    python -m examples.rosa
"""

from __future__ import annotations

import math

import torch
from torch import nn

# First: it sets the environment, and says what is missing.
from examples.sparse_training import Sums, main

# isort: split
import peft_kernels as pk


class RoSALinear(pk.nn.SparseDeltaLinear):
    """y = x·(W₀ + Δ)ᵀ + bias + scaling · x·Aᵀ·Bᵀ."""

    def add_low_rank(self, r: int, lora_alpha: float) -> None:
        self.lora_A = nn.Parameter(self.weight.new_empty(r, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, r))
        self.scaling = lora_alpha / r
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One op, to which the layer adds the gradient of Δ."""
        return pk.lora_linear(x, weight, self.lora_A, self.lora_B, self.scaling, bias)


def rosa(sums: Sums, density: float = 0.005, r: int = 8) -> None:
    model = sums.model
    weights = pk.sparse.linear_weights(model)
    # The sparse mask from the gradients of a few batches, as RoSA has it.
    batches = [batch for _, batch in zip(range(4), sums.batches())]
    layouts = pk.sparse.select(pk.sparse.gradient(model, weights, sums.loss, batches), density=density, scope="tensor")
    for name, layout in layouts.items():
        parent, _, child = name.rpartition(".")
        layer = RoSALinear.from_linear(model.get_submodule(name), layout)
        layer.add_low_rank(r, 2 * r)
        setattr(model.get_submodule(parent), child, layer)
    low_rank = [p for name, p in model.named_parameters() if "lora_" in name]
    groups = [{"params": model, "lr": 5e-4}, {"params": low_rank, "lr": 1e-3}]
    sums.fit(pk.optim.SparseAdamW(groups), sums.steps, "RoSA")


if __name__ == "__main__":
    main(rosa, __doc__)
