"""The providers of `ist_step`: LoRA and IST on plain PEFT and on ours, on one base; their check; a step's parts."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.testing import saved_tensors

from .guard import Guard
from .providers import why_not_installed

LORA, AUTHORS, ACCELERATED, OURS = "LoRA, PEFT", "IST, authors on PEFT", "LoRA, accelerated", "IST, ours"
AT_LABELS, BUDGET, CHECKPOINTED = "IST, logits at labels", "IST, ours, budget", "IST, budget, checkpoints"
HALF, PARTS = "IST, budget, loop every 20", "parts of a step"
LIGER = "LoRA, accelerated, Liger"
NEVER = 10**9  # the interval of timed steps: their loop is timed by itself
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
#: Bounds of relative errors. In bfloat16 both sides round every activation, and only a blunder stands out.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
#: The sizes of Llamas with random weights.
LLAMA_3_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
TINY = dict(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip

Batch = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A frozen model, and real text for it: token ids, int64 [number of rows, tokens of a row]."""

    name: str
    base: nn.Module
    text: torch.Tensor
    rows: int  # in a training batch

    def batch(self, number: int, rows: int, labelled: float) -> Batch:
        """Return batch `number`, in which the last part of each row, a share of `labelled`, carries labels."""
        ids = self.text[torch.arange(number * rows, (number + 1) * rows) % len(self.text)].to(self.base.device)
        labels = ids.clone()
        labels[:, : round(ids.shape[1] * (1 - labelled))] = -100
        return {"input_ids": ids, "labels": labels}


def load(device: str, length: int, tiny: bool) -> Case:
    """Load a model, and Python's own help as its text. For a random model a byte is a token: no time depends on it."""
    from transformers import AutoModelForCausalLM, LlamaConfig  # here: a machine without it has the other ops

    text = "\n".join(topics.values())
    ids: Sequence[int] = text.encode()
    if tiny or device == "cuda":
        rows, name, dtype = (2, "tiny", torch.float32) if tiny else (16, "Llama-3-8B's shapes", torch.bfloat16)
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(LlamaConfig(**TINY if tiny else LLAMA_3_8B), dtype=dtype)
    else:
        from examples.finetune_smollm2 import load_model, quieten  # needs the demo's packages

        quieten()
        rows, name, dtype = 8, "SmolLM2-135M", torch.float32
        base, tokenizer = load_model(SimpleNamespace(device=device, dtype="float32", model=None))
        ids = tokenizer(text).input_ids
    whole = torch.tensor(list(ids))[: len(ids) // length * length].view(-1, length)
    name = f"{name}, {str(dtype).removeprefix('torch.')}, r 32, {rows} × {length} tokens"
    return Case(name, base, whole, rows)


class Lane:
    """A provider: its own adapters on the shared base, its own optimizer, its own IST.

    Attributes:
        peak: bytes of a GPU at the most, where measured.
    """

    def __init__(
        self, name: str, base: nn.Module, accelerated: bool = False, ist: Callable[[nn.Module], Any] | None = None
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.name, self.mixed, self.peak = name, base.dtype == torch.bfloat16, 0
        shared = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        torch.manual_seed(0)
        config = LoraConfig(r=32, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = get_peft_model(shared, config).train()
        for parameter_name, parameter in self.model.named_parameters():
            if "lora_B" in parameter_name:  # at zero, nothing would flow into A, and damping would change no loss
                nn.init.normal_(parameter, std=0.005)
        self.adapters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.blocks = shared.model.layers
        if accelerated:
            pk.integrations.peft.accelerate(self.model)
        self.optimizer = torch.optim.AdamW(self.adapters, lr=2e-4)
        self.ist = ist(self.model) if ist else None

    def choose(self) -> int:
        """Begin a step, and return the depth of its backward in layers."""
        if not self.ist:
            return len(self.blocks)
        self.ist.before_step()
        return len(self.blocks) - min(self.ist.active)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.mixed)

    def loss(self, batch: Batch) -> torch.Tensor:
        with self.autocast():
            return self.model(**batch).loss

    def step(self, batch: Batch) -> int:
        depth = self.choose()
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return depth

    def loop(self, batch: Batch) -> int:
        """Estimate importance, and choose layers, for which a budget is then planned anew."""
        with self.autocast():
            self.ist.estimate(batch)
        return self.choose()

    def held_bytes(self) -> int:
        """Return what model and optimizer take of a GPU between steps, if this provider had it to itself."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *state) if tensor.is_cuda)


def make_lanes(base: nn.Module, guard: Guard) -> list[Lane]:
    """Make the providers that can be made."""
    from .authors_ist import AuthorsIST

    def ours(**settings: Any) -> Callable[[nn.Module], pk.ist.IST]:
        return lambda model: pk.ist.IST(model, pk.ist.ISTConfig(interval=NEVER, **settings))

    def at_labels() -> Lane:
        lane = Lane(AT_LABELS, base, accelerated=True, ist=ours())
        pk.integrations.transformers.logits_at_labels(lane.model)
        return lane

    def liger() -> Lane:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        lane = Lane(LIGER, base, accelerated=True)
        # Norms, MLP and loss of this model; its rotary embedding would be every other model's too.
        _apply_liger_kernel_to_instance(lane.model.get_base_model(), rope=False)
        return lane

    def with_budget(name: str, **settings: Any) -> Lane:
        budget = lowest_budget(Lane(LORA, base).model)
        return Lane(name, base, accelerated=True, ist=ours(backward_budget=budget, **settings))

    makers: dict[str, Callable[[], Lane]] = {
        LORA: lambda: Lane(LORA, base),
        AUTHORS: lambda: Lane(AUTHORS, base, ist=lambda model: AuthorsIST(model, interval=NEVER)),
        ACCELERATED: lambda: Lane(ACCELERATED, base, accelerated=True),
        OURS: lambda: Lane(OURS, base, accelerated=True, ist=ours()),
        AT_LABELS: at_labels,
        BUDGET: lambda: with_budget(BUDGET),
    }
    if not why_no_liger(base.device.type):
        makers[LIGER] = liger
    if base.device.type == "cuda":  # it saves memory, which is measured there only
        makers[CHECKPOINTED] = lambda: with_budget(CHECKPOINTED, checkpoint_beyond_budget=True)
    lanes = []
    for name, make in makers.items():
        if name not in guard.without:
            with guard(name):
                lanes.append(make())
    return lanes


def why_no_liger(device: str) -> str | None:
    return why_not_installed("liger_kernel") or (None if device == "cuda" else "liger_kernel needs a GPU")


def lowest_budget(model: nn.Module) -> float:
    """Return the lowest backward budget, in whole hundredths, that can be met while importance is flat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that this one cannot be met
        ist = pk.ist.IST(model, pk.ist.ISTConfig(backward_budget=0.01))
    wanted = max(1, int(ist.config.update_fraction * len(ist.layers)))
    return math.ceil(100 * ist.sampler.expected_depth(wanted, ist.unimportance)) / 100


def check(lanes: list[Lane], case: Case, labelled: float, guard: Guard) -> dict[str, str]:
    """Compare loss, gradients and rewards with those of PEFT and the authors' loop on few examples; return who is
    wrong, and by how much."""
    batch, tolerance = case.batch(0, 2, labelled), TOLERANCE[case.base.dtype]
    losses, wrong = {}, {}

    def hold(lane: str, what: str, error: float) -> None:
        if not error < tolerance:
            wrong.setdefault(lane, f"{what}: expected a relative error below {tolerance}, got {error:.1e}")

    for lane in lanes:
        with guard(lane.name):
            lane.choose()
            loss = lane.loss(batch)
            loss.backward()
            losses[lane.name] = loss.item()
    lane_of = {lane.name: lane for lane in lanes if lane.name in losses}
    pairs = ((ACCELERATED, LORA), (LIGER, LORA), (OURS, AUTHORS), (AT_LABELS, AUTHORS))
    for ours, theirs in (pair for pair in pairs if lane_of.keys() >= set(pair)):
        grads = [(p.grad, q.grad) for p, q in zip(lane_of[ours].adapters, lane_of[theirs].adapters)]
        if any((one is None) != (other is None) for one, other in grads):
            wrong[ours] = f"expected gradients of the adapters that {theirs} has them of, got others"
            continue
        one, other = (torch.cat([grad.flatten() for grad in side if grad is not None]) for side in zip(*grads))
        hold(ours, "loss", abs(losses[ours] / losses[theirs] - 1))
        hold(ours, "gradients", float((one - other).norm() / other.norm()))
    for lane in lanes:
        lane.optimizer.zero_grad()
    # Our first estimate is the plain one, and looks for a faster.
    for lane in [lane for lane in lane_of.values() if lane.ist] * 2:
        with guard(lane.name):
            lane.loop(case.batch(1, 2, labelled))
    looped = {name: lane for name, lane in lane_of.items() if name not in guard.failed}
    for ours in (name for name in (OURS, AT_LABELS) if looped.keys() >= {name, AUTHORS}):
        rewards = zip(looped[ours].ist.history[-1][2], looped[AUTHORS].ist.rewards)
        hold(ours, "rewards", max(abs(one / other - 1) for one, other in rewards))
    return wrong


class Adapted(nn.Module):
    """The adapted linears of a decoder layer alone, accelerated, on inputs of their own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        block = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
        self.q_proj, self.k_proj, self.v_proj = (getattr(block.self_attn, f"{name}_proj") for name in "qkv")
        self.up_proj, self.down_proj = block.mlp.up_proj, block.mlp.down_proj
        pk.integrations.peft.accelerate(self)

    def forward(self, x: torch.Tensor, z: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.up_proj(z), self.down_proj(h)

    def frozen(self, x: torch.Tensor, z: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the same linears without adapters."""
        return tuple(layer.get_base_layer()(tensor) for layer, tensor in zip(self.children(), (x, x, x, z, h)))


def parts_of(lane: Lane, tokens: tuple[int, int]) -> dict[str, Callable[[Batch], int]]:
    """Return forward and backward of what can be timed apart: the adapted linears of all layers, the same without
    adapters, lm_head with the loss. `tokens`: the shape of a batch, [rows, tokens of a row]."""
    base = lane.model.get_base_model()
    blocks, width = [Adapted(block) for block in lane.blocks], base.config.hidden_size
    x, z, h, top = (
        torch.randn(*tokens, size, device=lane.model.device, dtype=base.dtype, requires_grad=True)
        for size in (width, width, base.config.intermediate_size, width)
    )

    with torch.no_grad():
        grad_ys = [torch.ones_like(y) for y in blocks[0].frozen(x, z, h)]

    def linears(outputs: Callable[[Adapted], tuple[torch.Tensor, ...]], adapters: bool) -> int:
        for block in blocks:
            with lane.autocast():
                ys = outputs(block)
            trained = [parameter for parameter in block.parameters() if adapters and parameter.requires_grad]
            torch.autograd.grad(ys, [x, z, h, *trained], grad_ys)
        return 0

    def head(batch: Batch) -> int:
        with lane.autocast():
            logits = base.lm_head(top)
            loss = base.loss_function(logits=logits, labels=batch["labels"], vocab_size=base.config.vocab_size)
        torch.autograd.grad(loss, top)
        return 0

    return {
        "adapted linears": lambda _: linears(lambda block: block(x, z, h), adapters=True),
        "their frozen weights": lambda _: linears(lambda block: block.frozen(x, z, h), adapters=False),
        "lm_head and loss": head,
    }


def saved_at(lane: Lane, batch: Batch, depth: float) -> tuple[float, float]:
    """Return the bytes that a step's forward saves for backward, at this depth: in all, and in the decoder's layers."""
    points: dict[int, list[tuple[float, int]]] = {}
    for _ in range(20 if lane.ist else 1):  # two depths make a line; sets that start at a third cost no forward
        drawn = lane.choose()
        if drawn not in points and len(points) < 2:
            points[drawn] = [(size, drawn) for size in saved_bytes(lane, batch)]
    total, in_layers = (statistics.median(at_depth(column, depth)) for column in zip(*points.values()))
    return total, in_layers


def at_depth(points: Sequence[tuple[float, int]], depth: float) -> list[float]:
    """Carry values of (value, depth) to `depth` along the line with the median of all pairs' slopes."""
    slopes = [(v - w) / (d - e) for (v, d), (w, e) in combinations(points, 2) if d != e]
    slope = statistics.median(slopes) if slopes else 0.0
    return [value + slope * (depth - d) for value, d in points]


def saved_bytes(lane: Lane, batch: Batch) -> tuple[int, int]:
    """Return the bytes saved in all, and in the decoder's layers; parameters and the batch cost nothing to save."""
    bounds: list[int] = []  # how many tensors were saved as each layer began and ended
    with saved_tensors(ignore=(*lane.model.parameters(), *batch.values())) as saved:

        def note(*_: Any) -> None:
            bounds.append(len(saved))

        with contextlib.ExitStack() as hooks:
            for block in lane.blocks:
                hooks.enter_context(block.register_forward_pre_hook(note))
                hooks.enter_context(block.register_forward_hook(note))
            lane.loss(batch)
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved]
    return sum(sizes), sum(sum(sizes[begin:end]) for begin, end in zip(bounds[0::2], bounds[1::2]))
