"""S²FT (Yang et al., "S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", 2024): a few
channels of every MLP train, with all that belongs to them: the rows of gate and up that make a channel, and the column
of down that reads it. Rows and columns are thin products, without a dense dW.

    python -m examples.s2ft
"""

from __future__ import annotations

import torch

# First: it sets the environment, and says what is missing.
from examples.sparse_training import Sums, main

# isort: split
import peft_kernels as pk


def s2ft(sums: Sums, share: float = 0.03) -> None:
    model, layouts = sums.model, {}
    for name, module in model.named_modules():
        if not hasattr(module, "down_proj"):
            continue
        gate, up, down = (getattr(module, part).weight for part in ("gate_proj", "up_proj", "down_proj"))
        generator = torch.Generator().manual_seed(sums.options.seed)
        channels = torch.randperm(len(gate), generator=generator)[: max(1, round(share * len(gate)))].to(gate.device)
        layouts[f"{name}.gate_proj"] = pk.SparseLayout.rows(gate.shape, channels)
        layouts[f"{name}.up_proj"] = pk.SparseLayout.rows(up.shape, channels)
        layouts[f"{name}.down_proj"] = pk.SparseLayout.columns(down.shape, channels)
    pk.sparse.add_deltas(model, layouts)
    sums.fit(pk.optim.SparseAdamW(model, lr=1e-3), sums.steps, "S²FT")


if __name__ == "__main__":
    main(s2ft, __doc__)
