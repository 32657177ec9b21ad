"""Importance-aware Sparse Tuning on several processes, on GPUs or on CPUs; nothing is downloaded.

    torchrun --nproc-per-node 2 -m examples.ist_torchrun              # DDP
    torchrun --nproc-per-node 2 -m examples.ist_torchrun --fsdp       # FSDP2, block by block
    torchrun --nproc-per-node 2 -m examples.ist_torchrun --trainer    # transformers' Trainer, under DDP

On GPUs, accelerate launches the same, and can have Trainer use FSDP2:

    accelerate launch --multi-gpu --num-processes 2 -m examples.ist_torchrun
    accelerate launch --config-file examples/accelerate_fsdp2.yaml -m examples.ist_torchrun --trainer

The model is a tiny Llama with random weights that learns to count: put yours in `make_model`, your batches in `batch`.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peft_kernels as pk

VOCABULARY = 64
CONFIG = pk.ist.ISTConfig(interval=5)
LEARNING_RATE = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2 instead of DDP")
    parser.add_argument("--trainer", action="store_true", help="let transformers' Trainer do it")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)  # processes on one machine share its cores
    if options.trainer:
        rank, ist = train_with_trainer(options.steps)
    else:
        gpu = torch.cuda.is_available()
        dist.init_process_group("nccl" if gpu else "gloo")
        if gpu:
            torch.cuda.set_device(dist.get_node_local_rank())
        rank, ist = dist.get_rank(), train(options.steps, options.fsdp, "cuda" if gpu else "cpu")
    if rank == 0:
        print(ist)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(steps: int, fsdp: bool, device: str) -> pk.ist.IST:
    """A loop of one's own: `IST` after the model is wrapped or sharded, `before_step` in every process."""
    model = make_model().to(device)
    if fsdp:
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    ist = pk.ist.IST(model, CONFIG, optimizer=optimizer)
    rank, world = dist.get_rank(), dist.get_world_size()

    def estimated() -> dict[str, torch.Tensor]:
        """This process' part of an estimate's batch."""
        return batch(10_000 + ist.estimates * world + rank, rows=max(1, CONFIG.examples // world))

    for step in range(steps):
        ist.before_step(estimated)
        loss = model(**{name: ids.to(device) for name, ids in batch(step * world + rank).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, layers {ist.active}")
    return ist


def train_with_trainer(steps: int) -> tuple[int, pk.ist.IST]:
    callback = pk.ist.ISTCallback(CONFIG)
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=LEARNING_RATE, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=not gpu, ddp_backend="nccl" if gpu else "gloo",
        )  # fmt: skip
        data = [{name: ids[0] for name, ids in batch(seed, rows=1).items()} for seed in range(256)]
        Trainer(make_model(), arguments, train_dataset=data, callbacks=[callback]).train()
    return arguments.process_index, callback.ist


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=8, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))


def batch(seed: int, rows: int = 8, length: int = 16) -> dict[str, torch.Tensor]:
    """Rows that count on from a random number."""
    start = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + torch.arange(length)) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    main()
