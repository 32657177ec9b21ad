"""What the recipes of sparse fine-tuning share: SmolLM2-135M on the demo's sums, a loop, and the line at the end.

python -m examples.sparse_training            # every recipe, and LoRA beside them, in one table
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# First: it sets the environment, and says what is missing.
from examples.finetune_smollm2 import (
    encode,
    load_model,
    make_console,
    make_tasks,
    parser_of_example,
    quieten,
    save_table,
)

# isort: split
from rich.table import Table
from tqdm import tqdm


class Sums:
    """A model and its task.

    Attributes:
        model: SmolLM2-135M, frozen. steps: of the optimizer, that a recipe may take to train what it chose.
    """

    def __init__(self, options: argparse.Namespace, model: torch.nn.Module, tokenizer) -> None:
        self.options, self.steps = options, options.steps
        self.model, self.tokenizer = model, tokenizer
        self.model.requires_grad_(False).train()
        self.train_tasks, self.held_out = make_tasks(options)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The same batches in the same order, again and again."""
        size = self.options.batch_size
        while True:
            for first in range(0, len(self.train_tasks), size):
                yield self.batch(self.train_tasks[first : first + size])

    def batch(self, tasks: list[dict]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.options.device) for name, value in encode(self.tokenizer, tasks).items()}

    @staticmethod
    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        what: str,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Trains for so many steps, the learning rate going down to 0."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        with tqdm(total=steps, desc=what, unit="step") as bar:
            for step, batch in zip(range(steps), self.batches()):
                optimizer.zero_grad()
                loss = self.loss(self.model, batch)
                loss.backward()
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step(step)
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        size = self.options.batch_size
        parts = [self.held_out[first : first + size] for first in range(0, len(self.held_out), size)]
        return statistics.fmean([self.loss(self.model, self.batch(part)).item() for part in parts])

    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


Recipe = Callable[[Sums], None]


def parse_arguments(description: str) -> argparse.Namespace:
    parser = parser_of_example(description, "demo_output/sparse")
    parser.add_argument("--steps", type=int, default=40, help="of the optimizer")
    parser.set_defaults(batch_size=16, held_out=48)
    return parser.parse_args()


def run(recipe: Recipe, options: argparse.Namespace, model, tokenizer) -> tuple[float, float, int, float]:
    """Held-out loss before and after, trained numbers, seconds. The model is the recipe's to change."""
    torch.manual_seed(options.seed)
    sums = Sums(options, model, tokenizer)
    before, began = sums.held_out_loss(), time.perf_counter()
    recipe(sums)
    return before, sums.held_out_loss(), sums.trainable(), time.perf_counter() - began


def main(recipe: Recipe, description: str) -> None:
    """One recipe as a program."""
    quieten()
    options = parse_arguments(description)
    before, after, trained, seconds = run(recipe, options, *load_model(options))
    print(f"held-out loss {before:.3f} → {after:.3f}, {trained:,} numbers trained, {seconds:.0f} s")


def lora(sums: Sums) -> None:
    """What the others are compared with: the demo's LoRA, accelerated."""
    import peft_kernels as pk
    from examples.finetune_smollm2 import with_adapter

    sums.model = with_adapter(sums.model, sums.options)
    pk.integrations.peft.accelerate(sums.model)
    trained = [parameter for parameter in sums.model.parameters() if parameter.requires_grad]
    sums.fit(torch.optim.AdamW(trained, lr=1e-3), sums.steps, "LoRA")


def compare() -> None:
    from examples.lt_sft import lt_sft
    from examples.paca import paca
    from examples.rosa import rosa
    from examples.s2ft import s2ft
    from examples.shira import shira
    from examples.spiel import spiel
    from examples.threshold_mask import threshold_mask

    quieten()
    options = parse_arguments(__doc__)
    table = Table(title=f"SmolLM2-135M on sums, {options.steps} steps of {options.batch_size}")
    for column in ("", "held-out loss", "trained", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    recipes = {
        "LoRA, r 16": lora, "LT-SFT, 1 %": lt_sft, "SpIEL, 1 %": spiel, "RoSA, 0.5 % + r 8": rosa, "SHiRA, 1 %": shira,
        "S²FT": s2ft, "PaCA, 2 % of columns": paca, "Threshold-Mask": threshold_mask,
    }  # fmt: skip
    model, tokenizer = load_model(options)
    for name, recipe in recipes.items():
        before, after, trained, seconds = run(recipe, options, copy.deepcopy(model), tokenizer)
        row = f"{before:.3f} → {after:.3f}", f"{trained:,}", f"{seconds:.0f}"
        tqdm.write(f"{name}: held-out loss {row[0]}")
        table.add_row(name, *row)
    make_console().print(table)
    save_table(table, Path(options.output) / "results.md")


if __name__ == "__main__":
    compare()
