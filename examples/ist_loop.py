"""IST in a training loop of your own: AdamW, gradient accumulation, clipping, and a state from which a run that was
killed, or is to be longer, goes on to the bit. SmolLM2-135M on the sums of the demo.

    python -m examples.ist_loop --steps 12
    python -m examples.ist_loop --steps 24    # goes on from step 12
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import torch

# First: it sets the environment, and says what is missing.
from examples.finetune_smollm2 import encode, load_model, make_tasks, parser_of_example, quieten, with_adapter

# isort: split
from peft import get_peft_model_state_dict, set_peft_model_state_dict

import peft_kernels as pk

MICRO_BATCHES = 2  # a step of the optimizer


def main() -> None:
    quieten()
    options = parse_arguments()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    train, _ = make_tasks(options)
    model, tokenizer = load_model(options)
    model = with_adapter(model, options).train()
    pk.integrations.peft.accelerate(model)

    # The optimizer holds every adapter, also those that a step leaves frozen: no gradient, no update, no decay.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ist = pk.ist.IST(model, pk.ist.ISTConfig(interval=4, seed=options.seed), optimizer=optimizer)
    saved = output / "state.pt"
    if saved.exists():
        state = torch.load(saved, map_location="cpu", weights_only=True)
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        ist.load_state_dict(state["ist"])
        print(f"going on from step {ist.step}")

    def batch_of(tasks: list[dict]) -> dict[str, torch.Tensor]:
        return {name: value.to(options.device) for name, value in encode(tokenizer, tasks).items()}

    for step in range(ist.step, options.steps):
        tasks, loss = train[step * options.batch_size : (step + 1) * options.batch_size], 0.0
        ist.before_step(partial(batch_of, tasks))  # once a step of the optimizer; called only where it estimates
        for first in range(MICRO_BATCHES):
            part = model(**batch_of(tasks[first::MICRO_BATCHES])).loss / MICRO_BATCHES
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # passes over what has no gradient
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss:.3f}, layers {ist.active}")
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            adapter = get_peft_model_state_dict(model)
            save({"adapter": adapter, "optimizer": optimizer.state_dict(), "ist": ist.state_dict()}, saved)

    ist.close()  # every adapter trains again
    model.save_pretrained(output / "adapter")
    print(ist)


def save(state: dict, path: Path) -> None:
    """All of it or nothing: a run that is killed while it writes leaves the file before as it was."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_example(__doc__, "demo_output/ist_loop")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps, those of earlier runs included")
    parser.add_argument("--save-every", type=int, default=6, help="steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
