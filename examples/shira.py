"""SHiRA (Bhardwaj et al., "Sparse High Rank Adapters", 2024): a mask by weights and gradients, SNIP's, at which an
adapter trains; exported, PEFT reads it as its own.

    python -m examples.shira
"""

from __future__ import annotations

from pathlib import Path

# First: it sets the environment, and says what is missing.
from examples.sparse_training import Sums, main

# isort: split
import peft_kernels as pk


def shira(sums: Sums, density: float = 0.01) -> None:
    model = sums.model
    weights = pk.sparse.linear_weights(model)
    batches = [batch for _, batch in zip(range(4), sums.batches())]
    gradients = pk.sparse.gradient(model, weights, sums.loss, batches)
    scores = {name: gradients[name].mul_(weight.detach().abs()) for name, weight in weights.items()}
    pk.sparse.add_deltas(model, pk.sparse.select(scores, density=density, scope="tensor"))
    sums.fit(pk.optim.SparseAdamW(model, lr=1e-3), sums.steps, "SHiRA")
    # Loads with PeftModel.from_pretrained(base, folder).
    pk.sparse.export_shira(pk.sparse.deltas(model), Path(sums.options.output) / "shira", task="CAUSAL_LM")


if __name__ == "__main__":
    main(shira, __doc__)
