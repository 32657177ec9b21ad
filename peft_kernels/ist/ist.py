"""IST for a training loop: which layers train in the next step."""

from __future__ import annotations

import math
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import importance, optimizer_state, parallel
from .backward import Backward
from .budget import MOST, Budgeted
from .config import ISTConfig
from .ddp import DDPGradients, unwrapped
from .estimator import Estimator, weight_of
from .forwards import Forwards
from .hold import Entrance
from .importance import MOST_DRAWS
from .layers import adapter_parameters, around, find_layers, is_compiled_itself
from .participation import Participation
from .samplers import Fixed, checked, make_sampler


class IST:
    """Trains the adapters of a few layers at a time, the important ones more often (Yao et al., EMNLP 2024 Findings).

        with IST(model, ISTConfig(), optimizer=optimizer) as ist:
            for batch in loader:
                ist.before_step(batch)      # or a function that returns a batch of its own for the estimate
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        # all of them train again, also after an error or an interrupt; `ist.close()` does the same

    A model has one IST: to make another closes the one before.

    Inside of the model's forwards and their backwards, and nowhere else, the adapters of other layers require no
    gradient, so that autograd itself skips what does not train: a frozen layer's `lora_linear` computes dx alone, and
    below the lowest active layer there is no backward. What `before_step` chose holds until the next, whatever happens
    in between. Where gradients accumulate over micro-batches, call it once for each step of the optimizer.

    Layers that take no part in the loss (a vision tower under text, the encoder's under a decoder's batch) are not
    drawn, as far as the forwards so far tell. Where a step begins with a batch in which no chosen layer takes part,
    layers that do are drawn instead, and that forward runs again.

    Args:
        model: with adapters that train; Hugging Face PEFT's or `pk.nn.LoRALinear`s, or see `is_adapter`.
        config: the quantities of the algorithm.
        layers: names of the modules to take as layers, instead of finding them.
        is_adapter: says which parameters belong to adapters, as :func:`find_layers` has it.
        loss_of: (model, batch) → the loss of the estimate; by default the model's own, as Trainer finds it.
        optimizer: if given, checked to hold every adapter: a parameter that was frozen when the optimizer was made
            would never train. `frozen_state` other than "keep" needs it; it can be given later, as the attribute of
            that name.
        process_group: the processes that choose and estimate together, each on a part of the batch; all of them by
            default. DDP's wrapper, or the module in it, then has only what trains reduced, see `ddp.py`; where FSDP2
            shards the model, it does so before.
        in_charge: whether the training that this was made for goes on, asked ahead of every forward with gradients:
            once it does not, this closes. By default it goes on until `close()`.

    Attributes:
        layers: the model's :class:`Layer` s, in order.
        estimator: how the losses of an estimate are computed; `estimator.why` says it in words.
        unimportance: float32 [L], I of the algorithm: high where damping a layer does no harm.
        active: indices of the layers that train now.
        step: optimizer steps begun.
        updates: how often each layer was chosen.
        history: (step, importance [L], rewards of the candidates) for every estimate that changed importance.
        left_out: how many estimates did not, by the reason: no label counted, or a loss was not finite.
        estimate_seconds: spent in estimates by this process.

    Raises:
        ValueError: for a model without adapters, adapters that layers share, a sampler that is none, an optimizer that
            misses an adapter, importance asked of adapters that have no scaling to damp, a budget that the sampler or
            the blocks cannot keep, or a model in a DDP that cannot be worked with, or in FSDP1.

    Warns:
        UserWarning: where a backward budget cannot be met while all layers are equally important, with the depth that
            will be had instead.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ISTConfig | None = None,
        *,
        layers: Sequence[str] | None = None,
        is_adapter: Callable[[str, nn.Parameter], bool] | None = None,
        loss_of: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        in_charge: Callable[[], bool] = lambda: True,
    ) -> None:
        wrapper, model = model, unwrapped(model)
        for other in Entrance.owners(model):
            other.close()
        self.model = model
        self.config = config or ISTConfig()
        self.sampler = make_sampler(self.config.sampler)
        self.layers = find_layers(model, layers, is_adapter)
        self._is_adapter = is_adapter
        self.optimizer = optimizer
        if self.sampler.needs_importance:
            for layer in self.layers:
                if not layer.scaled:
                    raise ValueError(
                        f"IST: expected adapters with a scaling to damp in {layer.name}, found none: "
                        f"take a sampler that needs no importance ('rst', 'lisa', 'cyclic')"
                    )
        self._around = around(model, self.layers)
        self._check_not_compiled()
        self.estimator = Estimator(model, self.layers, self.config, loss_of, process_group)
        self.backward = Backward(model, self.layers)
        self._saved_depth: int | None = None
        count = len(self.layers)
        self._wanted = max(1, int(self.config.update_fraction * count))
        self.unimportance = torch.zeros(count)
        if self.config.backward_budget is not None:
            self._bound_backward(self.config.backward_budget)
        self.active = list(range(count))
        self.step = 0
        self.updates = [0] * count
        self.history: list[tuple[int, list[float], list[float]]] = []
        self.left_out: dict[str, int] = {}
        self.estimate_seconds = 0.0
        self._group = process_group
        self._agreed = False  # with the other processes, on what to draw from
        self.sharded = parallel.Sharded(model, self.layers)
        self._owner = {id(parameter): i for i, layer in enumerate(self.layers) for parameter in layer.parameters}
        self.gradients = DDPGradients(wrapper, self.layers, self._trains) if parallel.is_initialised() else None
        self.participation = Participation(self.layers, process_group)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrived)
            for layer in self.layers
            for parameter in layer.parameters
        ]
        self._skipped = 0.0  # layers below the lowest active one, summed over steps
        self._generator = torch.Generator().manual_seed(self.config.seed)
        self._closed = False
        self._forwards = Forwards(self, in_charge)
        self._forwards.choose(self.active)

    def __enter__(self) -> IST:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            optimizer_state.check_holds(optimizer, self.layers)
        self._optimizer = optimizer

    @property
    def estimates(self) -> int:
        """The number of estimates, with those that changed nothing: the batch of the next may be drawn by it."""
        return len(self.history) + sum(self.left_out.values())

    @property
    def skipped(self) -> float:
        """The mean share of layers below the lowest active one, of those that take part, in [0, 1): backward does not
        reach them, unless something else trains there."""
        return self._skipped / (self.step * len(self.layers)) if self.step else 0.0

    @property
    def reward_spread(self) -> float:
        """The median over estimates of how far the rewards of the candidates lie apart; near 0, importance does not
        move: the loss is too high for exp(−loss) to differ, or damping does nothing yet."""
        spreads = [max(rewards) - min(rewards) for _, _, rewards in self.history]
        return statistics.median(spreads) if spreads else 0.0

    @property
    def importance(self) -> torch.Tensor:
        """σ(−I) of each layer, float32 [L] in (0, 1): the odds of being chosen."""
        return torch.sigmoid(-self.unimportance)

    def before_step(self, batch: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None) -> list[int]:
        """Estimate importance if it is time to, choose the layers of the next optimizer step, and switch to them.

        Args:
            batch: what the estimate computes the loss on, or a function that returns it, called only when it is needed;
                with a sampler that needs no importance, nothing.

        Returns:
            The indices of the layers that train.

        Raises:
            ValueError: without a batch when one is needed, if the sampler returns no set of layers, or if this was
                closed.
        """
        self._check_open()
        if self.config.frozen_state != "keep" and self.optimizer is None:
            raise ValueError(f"IST: expected an optimizer for frozen_state={self.config.frozen_state!r}, got none")
        self._check_not_compiled()
        if self.gradients is not None:
            self.gradients.readmit()  # where the step before was interrupted
        if self.sampler.needs_importance and self.step > 0 and self.step % self.config.interval == 0:
            if batch is None:
                raise ValueError("IST.before_step: expected a batch, or a function that returns one, got None")
            if callable(batch):
                with importance.same_random_state(self.model):  # collators may draw
                    batch = batch()
            self.estimate(batch)
        self._agree()
        if self.step > 0:
            self.participation.next_step(self.active)
        self.set_active(self._drawn(self.participation.candidates()))
        self._count(1)
        self._forwards.next_step(may_draw=self.participation.is_known and not isinstance(self.sampler, Fixed))
        self.step += 1
        return list(self.active)

    def draw_again(self, among: Sequence[int]) -> None:
        """Draw from these layers instead of what was drawn for this step."""
        for _ in range(MOST_DRAWS):
            drawn = self._drawn(among)
            if not set(drawn).isdisjoint(among):
                break
        else:
            drawn = [among[torch.randint(len(among), (), generator=self._generator)]]
        self.exchange(drawn)

    def exchange(self, layers: Sequence[int]) -> None:
        """Have these layers train in this step, instead of those that were chosen."""
        self._count(-1)
        self.set_active(layers)
        self._count(1)

    def _drawn(self, among: Sequence[int]) -> list[int]:
        if not self.sampler.draws_among:
            drawn = self.sampler.sample(self.step, self._wanted, self.unimportance, self._generator)
            return checked(drawn, len(self.layers))
        wanted = max(1, int(self.config.update_fraction * len(among)))
        drawn = self.sampler.sample(self.step, wanted, self.unimportance[among], self._generator)
        return [among[index] for index in checked(drawn, len(among))]

    def _count(self, times: int) -> None:
        """Count the layers that train now as having trained in so many steps."""
        for index in self.active:
            self.updates[index] += times
        in_use = self.participation.candidates()
        below = sum(index < self.active[0] for index in in_use) / len(in_use)
        self._skipped += times * below * len(self.layers)

    def estimate(self, batch: Mapping[str, Any]) -> None:
        """Update the importance once, from the losses on `batch`; model, modes and random state stay as they were.

        Where no label of the batch counts, or a loss or exp(−loss) is not finite, importance stays what it was, and
        `left_out` counts the estimate.

        Raises:
            ValueError: if the model gives no loss, see `loss_of`.
        """
        began = time.perf_counter()
        self._agree()
        config = self.config
        size = max(1, int(config.suppress_fraction * len(self.layers)))
        sets = importance.draw_suppress_sets(self.unimportance, size, config.candidates, self._generator)
        losses, weight = self.estimator(sets, _moved(batch, self._device()))
        losses = parallel.joined_losses(losses, weight, self._device(), self._group)
        self.estimate_seconds += time.perf_counter() - began
        if not importance.rewards_of(losses).isfinite().all() or not all(map(math.isfinite, losses)):
            reason = "a loss was not finite" if self._anywhere_labelled(batch) else "no label counted"
            self.left_out[reason] = self.left_out.get(reason, 0) + 1
            return
        self.unimportance, rewards = importance.updated(self.unimportance, sets, losses, config.rate)
        self._agreed = False  # processors differ in the last bit of exp
        self.history.append((self.step, self.importance.tolist(), rewards))

    def set_active(self, layers: Sequence[int]) -> None:
        """Let the adapters of these layers train, and no others; what does not train has no gradient, not zeros.

        Backward then stops at the lowest of them, also where a library makes the input of the model require a gradient
        (`enable_input_require_grads`, checkpointing).
        """
        self._check_open()
        self.active = checked(layers, len(self.layers))
        self.sharded.reshard()
        self._forwards.choose(self.active)
        active = set(self.active)
        for index, layer in enumerate(self.layers):
            if index not in active:
                for parameter in layer.parameters:
                    parameter.grad = None
        self.backward.stop_below(self.active, self.participation.candidates(), self._saved_depth)
        if self.optimizer is not None:
            parameters = [(p, i in active) for i, layer in enumerate(self.layers) for p in layer.parameters]
            optimizer_state.place(self.optimizer, parameters, self.config.frozen_state)

    def write(self, writer: torch.utils.tensorboard.SummaryWriter) -> None:
        """Write the newest estimate to TensorBoard: importance and updates of each layer, and the spread of rewards."""
        step, values, rewards = self.history[-1]
        for layer, value, updates in zip(self.layers, values, self.updates):
            writer.add_scalar(f"ist_importance/{layer.name}", value, step)
            writer.add_scalar(f"ist_updates/{layer.name}", updates, step)
        writer.add_scalar("ist/reward_spread", max(rewards) - min(rewards), step)
        writer.add_scalar("ist/skipped_backward", self.skipped, step)
        writer.add_scalar("ist/estimates_left_out", sum(self.left_out.values()), step)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on as this one would, in lists and tensors."""
        return {
            "layers": [layer.name for layer in self.layers],
            "unimportance": self.unimportance.clone(),
            "active": list(self.active),
            "step": self.step,
            "updates": list(self.updates),
            "skipped": self._skipped,
            "history": list(self.history),
            "left_out": dict(self.left_out),
            "estimator": self.estimator.state_dict(),
            "participation": self.participation.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a run over the same layers.

        Raises:
            ValueError: if the state is of other layers; nothing has changed then.
        """
        names = [layer.name for layer in self.layers]
        if list(state["layers"]) != names:
            raise ValueError(f"IST: expected the state of {len(names)} layers {names[0]} …, got {state['layers']}")
        self._generator.set_state(state["generator"].cpu())
        self.unimportance = state["unimportance"].cpu().clone()
        self.step, self.updates, self._skipped = state["step"], list(state["updates"]), state["skipped"]
        self.estimator.load_state_dict(state["estimator"])
        self.participation.load_state_dict(state["participation"])
        self.left_out = dict(state["left_out"])
        self.history = [tuple(entry) for entry in state["history"]]
        self.set_active(state["active"])
        self._agreed = False

    def close(self) -> None:
        """Let all adapters train again, and leave nothing of IST in the model: DDP reduces gradients as it did."""
        if self._closed:
            return
        self.set_active(range(len(self.layers)))
        self._closed = True
        self._forwards.remove()
        self.participation.remove()
        for hook in self._hooks:
            hook.remove()
        if self.gradients is not None:
            self.gradients.remove()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("IST: expected one that is in charge of its model, got one that was closed")

    def _anywhere_labelled(self, batch: Mapping[str, Any]) -> bool:
        """Return whether a label counts in any process; one without labels [examples, tokens] counts as labelled."""
        return not parallel.everywhere(weight_of(batch, 0) == 0, self._device(), self._group)

    def _device(self) -> torch.device:
        return self.layers[0].parameters[0].device

    def _trains(self, parameter: nn.Parameter) -> bool:
        index = self._owner.get(id(parameter))
        return parameter.requires_grad if index is None else index in self.active

    def _arrived(self, parameter: nn.Parameter) -> None:
        """Note whose gradient came. One that came through no forward, such as a penalty's, may be a frozen layer's."""
        if self._trains(parameter):
            self.participation.fed.add(self._owner[id(parameter)])
        else:
            parameter.grad = None

    def _agree(self) -> None:
        """Have every process draw from the same state: from then on all draw the same."""
        if self._agreed:
            return
        self.sharded.reshard()
        self.sharded.check_current()
        mine = self._generator.get_state(), self.unimportance
        state, self.unimportance = parallel.agreed(mine, self._device(), self._group)
        self._generator.set_state(state)
        self._agreed = True

    def _bound_backward(self, budget: float) -> None:
        """Have the sampler keep the budget, and say what can be had while all layers are equally important."""
        count = len(self.layers)
        if isinstance(self.sampler, Fixed):
            depth = 1.0 - min(self.sampler.layers) / count
            raise ValueError(
                f"IST: expected a sampler that varies for a backward_budget, got Fixed, of depth {depth:.2f}"
            )
        self.sampler = Budgeted(self.sampler, budget)
        depth = self.sampler.expected_depth(self._wanted, self.unimportance)
        if depth > budget + 5e-3:
            warnings.warn(
                f"IST: backward_budget={budget:.2f} cannot be met while layers are equally important, with "
                f"{self._wanted} of {count} layers a step on average and at most {min(count, MOST * self._wanted)}: "
                f"the expected depth of backward is {depth:.2f}",
                stacklevel=3,
            )
        if self.config.checkpoint_beyond_budget:
            self.backward.check_can_checkpoint()
            self._saved_depth = max(1, int(budget * count))

    def _check_not_compiled(self) -> None:
        """Raise ValueError if one compiled graph holds several layers: each set of them would be compiled anew."""
        if isinstance(self.sampler, Fixed):
            return
        for module in self._around:
            if is_compiled_itself(module):
                raise ValueError(
                    f"IST: expected each block compiled by itself (block.compile()) where layers change from step to "
                    f"step, got {type(getattr(module, '_orig_mod', module)).__name__} compiled as a whole"
                )

    def __str__(self) -> str:
        """Return a table of how often each layer trained, and how important it is."""
        estimates = f"{len(self.history)} estimate{'' if len(self.history) == 1 else 's'}"
        lines = [f"{self.step} steps, {self.skipped:.0%} of backward skipped, {estimates} of importance"]
        if self.history:
            lines.append(f"rewards of candidates differ by {self.reward_spread:.1e} (median)")
        if self.estimator.why:
            lines += textwrap.wrap(f"losses by {self.estimator.why}", 78, subsequent_indent="  ")
        for reason, count in self.estimator.one_by_one.items():
            lines += textwrap.wrap(f"one by one in {count} estimates: {reason}", 78, subsequent_indent="  ")
        for reason, count in self.left_out.items():
            lines.append(f"estimates left out: {count} ({reason})")
        names = [layer.name.removeprefix("base_model.model.") for layer in self.layers]
        inside = {id(parameter) for layer in self.layers for parameter in layer.parameters}
        adapters = adapter_parameters(self.model, self._is_adapter)
        outside = [name for name, parameter in adapters if id(parameter) not in inside]
        if outside:
            lines.append(f"adapters in no layer train in every step: {outside[0]} and {len(outside) - 1} more")
        width = max(map(len, names))
        for name, updates, value in zip(names, self.updates, self.importance.tolist()):
            share = updates / self.step if self.step else 0.0
            lines.append(f"  {name:<{width}}  trained {updates:>5} ({share:>4.0%})  importance {value:.3f}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw importance over time as a heat map in the data's own range, and how often each layer trained (PNG).

        Raises:
            ValueError: before the first estimate.
        """
        from .plot import draw  # needs matplotlib, which the package does not

        if not self.history:
            raise ValueError("IST.plot: expected at least one estimate of importance, got none")
        steps, values, _ = zip(*self.history)
        return draw(steps, values, self.updates, Path(path))


def _moved(value: Any, device: torch.device) -> Any:
    """Return the batch with its tensors, however nested, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(inner, device) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(inner, device) for inner in value)
    return value
