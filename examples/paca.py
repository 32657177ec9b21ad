"""PaCA (Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", 2025): a few columns of every
weight, drawn at random, train where they stand. Of a layer's input only those columns are kept for backward.

    python -m examples.paca
"""

from __future__ import annotations

# First: it sets the environment, and says what is missing.
from examples.sparse_training import Sums, main

# isort: split
import peft_kernels as pk


def paca(sums: Sums, density: float = 0.02) -> None:
    weights = pk.sparse.linear_weights(sums.model)
    layouts = pk.sparse.random(weights, density=density, structure="columns", seed=sums.options.seed)
    pk.sparse.add_deltas(sums.model, layouts)
    sums.fit(pk.optim.SparseAdamW(sums.model, lr=1e-3), sums.steps, "PaCA")


if __name__ == "__main__":
    main(paca, __doc__)
