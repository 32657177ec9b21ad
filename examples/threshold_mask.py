"""Threshold-Mask (Zhao et al., "Masking as an Efficient Alternative to Finetuning for Pretrained Language Models",
2020): the weights stay as they are, and which of them take part is learned: those whose scores reach a threshold.

    python -m examples.threshold_mask
"""

from __future__ import annotations

import torch
from torch import nn

# First: it sets the environment, and says what is missing.
from examples.sparse_training import Sums, main

# isort: split
import peft_kernels as pk

THRESHOLD = 0.01


class MaskedLinear(nn.Linear):
    """y = x·(W ⊙ 1[S ≥ τ])ᵀ + bias; the scores S train, straight through the comparison."""

    def add_scores(self) -> None:
        """Drawn above the threshold: at first every weight takes part."""
        scores = torch.empty_like(self.weight, dtype=torch.float32)
        self.scores = nn.Parameter(scores.uniform_(THRESHOLD, 2 * THRESHOLD))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pk.masked_linear(x, self.weight, self.scores, THRESHOLD, self.bias)


def threshold_mask(sums: Sums) -> None:
    layers = [m for n, m in sums.model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")]
    for layer in layers:
        layer.__class__ = MaskedLinear
        layer.add_scores()
    scores = [layer.scores for layer in layers]
    optimizer = torch.optim.AdamW(scores, lr=5e-6, weight_decay=0.0, fused=True)
    sums.fit(optimizer, sums.steps, "Threshold-Mask")


if __name__ == "__main__":
    main(threshold_mask, __doc__)
