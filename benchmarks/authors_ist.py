"""IST as its authors run it, on plain PEFT: what the benchmark measures ours against and the tests compare it with.

Yao, Gao, Li, Zhao, Chen, Zhang: *Layer-wise Importance Matters: Less Memory for Better Performance in
Parameter-efficient Fine-tuning of Large Language Models*, EMNLP 2024 Findings. It is written anew from the algorithm,
with the paper's values and nothing of this package, and spends its time as theirs does: one forward per candidate by
`model(**batch).loss`, with all logits and the cache of keys and values that the model's configuration asks for;
freezing by `requires_grad` and nothing more. It differs where theirs does not run: PEFT keeps its scalings in
dictionaries, of which only the adapters' are touched. Draws come from a seeded generator, so that another
implementation can make the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn


class AuthorsIST:
    """Trains a quarter of the layers at a time: call `before_step(batch)` ahead of each step of the optimizer.

    Args:
        model: a PEFT model of a decoder whose blocks are `model.layers`, four or more of them (with fewer, three
            different sets cannot be drawn).
        interval: steps between two estimates of importance.
        seed: the seed of the draws.

    Attributes:
        unimportance: float32 [L], high where damping a layer does no harm.
        active: indices of the layers that train now, ascending.
        rewards: exp(−loss) of each candidate of the last estimate.
        estimates: how many estimates there were.
    """

    def __init__(self, model: nn.Module, interval: int = 10, seed: int = 0) -> None:
        self.model, self.interval, self.step = model, interval, 0
        blocks = model.get_base_model().model.layers
        self.adapters = [[p for name, p in block.named_parameters() if "lora_" in name] for block in blocks]
        self.scalings = [[m.scaling for m in block.modules() if isinstance(m, LoraLayer)] for block in blocks]
        self.unimportance = torch.zeros(len(blocks))
        self.generator = torch.Generator().manual_seed(seed)
        self.active = list(range(len(blocks)))
        self.rewards: list[float] = []
        self.estimates = 0

    def before_step(self, batch: Mapping[str, torch.Tensor] | None = None) -> None:
        if self.step > 0 and self.step % self.interval == 0:
            self.estimate(batch)
        odds = torch.sigmoid(-self.unimportance)
        self.active = sorted(torch.multinomial(odds, int(0.25 * len(odds)), generator=self.generator).tolist())
        for index, parameters in enumerate(self.adapters):
            for parameter in parameters:
                parameter.requires_grad_(index in self.active)
        self.step += 1

    def estimate(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Update the importance: damp three different sets of half of the layers to a quarter, and compare losses."""
        p = torch.sigmoid(self.unimportance)
        sets: list[set[int]] = []
        while len(sets) < 3:
            drawn = set(torch.multinomial(p, int(0.5 * len(p)), generator=self.generator).tolist())
            if drawn not in sets:
                sets.append(drawn)
        self.model.eval()
        with torch.no_grad():
            self.rewards = [self._reward(chosen, batch) for chosen in sets]
        self.model.train()
        mean = sum(self.rewards) / len(self.rewards)
        for chosen, reward in zip(sets, self.rewards):
            for index in chosen:
                self.unimportance[index] += 10 * (reward - mean) * p[index] * (1 - p[index])
        self.estimates += 1

    def _reward(self, damped: set[int], batch: Mapping[str, torch.Tensor]) -> float:
        scalings = [scaling for index in damped for scaling in self.scalings[index]]
        saved = [dict(scaling) for scaling in scalings]
        for scaling in scalings:
            for adapter in scaling:
                scaling[adapter] *= 0.25
        loss = self.model(**batch).loss
        for scaling, before in zip(scalings, saved):
            scaling.update(before)
        return torch.exp(-loss).item()
