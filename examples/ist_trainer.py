"""IST in transformers' Trainer: SmolLM2-135M on the sums of the demo, with checkpoints. Kill it, and run it again: it
goes on from the newest complete checkpoint with the layers and examples that it would have had.

    python -m examples.ist_trainer
    python -m examples.ist_trainer --backward-budget 0.5    # backward through half of the layers on average
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

# First: it sets the environment, and says what is missing.
from examples.finetune_smollm2 import encode, load_model, make_tasks, parser_of_example, quieten, with_adapter

# isort: split
from transformers import Trainer, TrainingArguments

import peft_kernels as pk


def main() -> None:
    quieten()
    options = parse_arguments()
    output = Path(options.output)
    train, _ = make_tasks(options)
    model, tokenizer = load_model(options)
    model = with_adapter(model, options)
    pk.integrations.peft.accelerate(model)  # a frozen layer then computes and keeps nothing for its adapters

    config = pk.ist.ISTConfig(
        interval=max(1, options.steps // 6), backward_budget=options.backward_budget, seed=options.seed
    )
    ist = pk.ist.ISTCallback(config)
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3, logging_steps=max(1, options.steps // 6), seed=options.seed, report_to="none",
        save_steps=max(1, options.steps // 3), save_total_limit=2, use_cpu=options.device == "cpu", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, data_collator=partial(encode, tokenizer), callbacks=[ist]
    )
    checkpoint = pk.ist.last_checkpoint(output)
    print(f"going on from {checkpoint}" if checkpoint else "starting anew")
    trainer.train(resume_from_checkpoint=checkpoint)

    model.save_pretrained(output / "adapter")
    print(ist.ist)
    print(f"importance over time: {ist.ist.plot(output / 'importance.png')}")


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_example(__doc__, "demo_output/ist_trainer")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps, at least 2")
    parser.add_argument("--backward-budget", type=float, default=None, help="expected depth, a fraction of the layers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
