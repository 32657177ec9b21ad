"""SpIEL (Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024): entries that stay near zero are
dropped while the delta trains, and others, where gradients are large, grow in their place.

    python -m examples.spiel
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch

# First: it sets the environment, and says what is missing.
from examples.sparse_training import Sums, main

# isort: split
import peft_kernels as pk

REGROWTHS = 3
ESTIMATED_OVER = 2  # batches, after the one that finds the candidates


def spiel(sums: Sums, density: float = 0.01, share: float = 0.2) -> None:
    layouts = pk.sparse.random(pk.sparse.linear_weights(sums.model), density=density, seed=sums.options.seed)
    layers = pk.sparse.add_deltas(sums.model, layouts)
    optimizer = pk.optim.SparseAdamW(sums.model, lr=1e-3)
    every = max(1, sums.steps // (REGROWTHS + 1))

    def after_step(step: int) -> None:
        if (step + 1) % every or step + 1 == sums.steps:
            return
        sums_of, squares = estimate(sums, layers)
        for name, layer in layers.items():
            positions, total = sums_of[name]
            count = min(round(share * layer.layout.nnz), len(positions))
            regrown = pk.sparse.drop_grow(layer.layout, layer.values, positions, total.abs(), count)
            pk.sparse.regrow(layer, regrown, optimizer, total / ESTIMATED_OVER, squares[name] / ESTIMATED_OVER)

    sums.fit(optimizer, sums.steps, "SpIEL", after_step)


def estimate(sums: Sums, layers: dict) -> tuple[dict, dict]:
    """For each layer the candidates and the sum of their gradients over some batches; and of the squares."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    squares: dict[str, torch.Tensor] = {}

    def take(name: str, weight: torch.nn.Parameter) -> None:
        """As soon as a dense gradient is there: all but the candidates' is let go."""
        gradient, layout = weight.grad, layers[name].layout
        weight.grad = None
        if name not in found:
            positions, _ = pk.sparse.candidates(gradient, layout, layout.nnz)
            found[name] = positions, gradient.new_zeros(len(positions))
            squares[name] = gradient.new_zeros(len(positions))
            return
        positions, total = found[name]
        seen = gradient.flatten()[positions]
        total += seen
        squares[name] += seen.square()

    with contextlib.ExitStack() as undo:
        for name, layer in layers.items():
            undo.callback(layer.weight.requires_grad_, False)
            layer.weight.requires_grad_(True)
            undo.enter_context(layer.weight.register_post_accumulate_grad_hook(partial(take, name)))
        for _, batch in zip(range(1 + ESTIMATED_OVER), sums.batches()):
            sums.loss(sums.model, batch).backward()
    sums.model.zero_grad()
    return found, squares


if __name__ == "__main__":
    main(spiel, __doc__)
