"""LT-SFT (Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022): train everything, see what
moved most, begin again and train only that. The result is a small file that adds to others.

    python -m examples.lt_sft
"""

from __future__ import annotations

from pathlib import Path

import torch

# First: it sets the environment, and says what is missing.
from examples.sparse_training import Sums, main

# isort: split
import peft_kernels as pk


def lt_sft(sums: Sums, density: float = 0.01) -> None:
    model = sums.model
    weights = pk.sparse.linear_weights(model)
    pretrained = {name: weight.detach().clone() for name, weight in weights.items()}

    # Phase 1: dense training, and which entries moved most in all of the model.
    for weight in weights.values():
        weight.requires_grad_(True)
    dense = torch.optim.AdamW(weights.values(), lr=2e-5, weight_decay=0.0, fused=True)
    sums.fit(dense, max(1, sums.steps // 2), "LT-SFT, phase 1: dense")
    layouts = pk.sparse.select(pk.sparse.change(weights, pretrained), density=density)

    # Rewind.
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(pretrained[name]).requires_grad_(False)
            weight.grad = None
    del dense, pretrained

    # Phase 2: those entries alone, at the rate of a delta.
    pk.sparse.add_deltas(model, layouts)
    optimizer = pk.optim.SparseAdamW(model, lr=1e-3)
    sums.fit(optimizer, sums.steps, "LT-SFT, phase 2: sparse")

    folder = Path(sums.options.output) / "lt_sft"
    pk.sparse.export_lt_sft(pk.sparse.deltas(model), folder)  # as composable-sft reads it
    pk.sparse.save(pk.sparse.deltas(model), folder / "deltas.safetensors")


if __name__ == "__main__":
    main(lt_sft, __doc__)
