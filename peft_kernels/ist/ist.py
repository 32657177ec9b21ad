"""IST for a training loop: which layers train in the next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import importance
from .config import ISTConfig
from .layers import find_layers
from .samplers import checked, make_sampler


class IST:
    """Trains the adapters of a few layers at a time, the important ones more often (Yao et al., EMNLP 2024 Findings).

        ist = IST(model, ISTConfig(), optimizer=optimizer)
        for batch in loader:
            ist.before_step(batch)      # or a function that returns a batch of its own for the estimate
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ist.set_active(range(len(ist.layers)))  # all of them again

    Only `requires_grad` of adapter parameters changes, so autograd itself skips what does not train: a frozen layer's
    `lora_linear` computes dx alone, and below the lowest active layer there is no backward. Where gradients accumulate
    over micro-batches, call `before_step` once for each step of the optimizer.

    Args:
        model: with adapters that train; Hugging Face PEFT's or `pk.nn.LoRALinear`s, or see `is_adapter`.
        config: the quantities of the algorithm.
        layers: names of the modules to take as layers, instead of finding them.
        is_adapter: says which parameters belong to adapters, as :func:`find_layers` has it.
        loss_of: (model, batch) → the loss of the estimate; `model(**batch).loss` by default.
        optimizer: if given, it is made sure of that it holds every adapter: a parameter that was frozen when the
            optimizer was made would never train.

    Attributes:
        layers: the model's :class:`Layer` s, in order.
        unimportance: float32 [L], I of the algorithm: high where damping a layer does no harm.
        active: indices of the layers that train now.
        step: optimizer steps begun.
        updates: how often each layer was chosen.
        history: (step, importance [L], rewards of the candidates) of every estimate.

    Raises:
        ValueError: for a model without adapters, adapters that layers share, a sampler that is none, an optimizer that
            misses an adapter, or importance asked of adapters that have no scaling to damp.
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
    ) -> None:
        self.model = model
        self.config = config or ISTConfig()
        self.sampler = make_sampler(self.config.sampler)
        self.layers = find_layers(model, layers, is_adapter)
        self.loss_of = loss_of or _loss_of
        if self.sampler.needs_importance:
            for layer in self.layers:
                if not layer.scaled:
                    raise ValueError(
                        f"IST: expected adapters with a scaling to damp in {layer.name}, found none: "
                        f"take a sampler that needs no importance ('rst', 'lisa', 'cyclic')"
                    )
        if optimizer is not None:
            self.check_optimizer(optimizer)
        count = len(self.layers)
        self.unimportance = torch.zeros(count)
        self.active = list(range(count))
        self.step = 0
        self.updates = [0] * count
        self.history: list[tuple[int, list[float], list[float]]] = []
        self._generator = torch.Generator().manual_seed(self.config.seed)
        self._cut: torch.utils.hooks.RemovableHandle | None = None

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
            ValueError: without a batch when one is needed, or if the sampler returns no set of layers.
        """
        if self.sampler.needs_importance and self.step > 0 and self.step % self.config.interval == 0:
            if batch is None:
                raise ValueError("IST.before_step: expected a batch, or a function that returns one, got None")
            self.estimate(batch() if callable(batch) else batch)
        count = len(self.layers)
        wanted = max(1, int(self.config.update_fraction * count))
        chosen = checked(self.sampler.sample(self.step, wanted, self.unimportance, self._generator), count)
        self.set_active(chosen)
        for index in chosen:
            self.updates[index] += 1
        self.step += 1
        return chosen

    def estimate(self, batch: Mapping[str, Any]) -> None:
        """One update of the importance from the losses on `batch`; model, modes and random state stay as they were.

        Raises:
            ValueError: if a loss is not a number; importance is then what it was.
        """
        config = self.config
        size = max(1, int(config.suppress_fraction * len(self.layers)))
        sets = importance.draw_suppress_sets(self.unimportance, size, config.candidates, self._generator)
        device = next(self.model.parameters()).device
        batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        losses = importance.losses_one_by_one(self.model, self.layers, sets, config.damping, batch, self.loss_of)
        if any(math.isnan(loss) for loss in losses):
            raise ValueError(f"IST: expected losses that are numbers before step {self.step}, got {losses}")
        self.unimportance, rewards = importance.updated(self.unimportance, sets, losses, config.rate)
        self.history.append((self.step, self.importance.tolist(), rewards))

    def set_active(self, layers: Sequence[int]) -> None:
        """Let the adapters of these layers train, and no others; what does not train has no gradient, not zeros.

        The input of the lowest of them is detached, unless something below trains: some libraries make the input of the
        model require a gradient (`enable_input_require_grads`, checkpointing), and backward would go down to it.
        """
        self.active = checked(layers, len(self.layers))
        active = set(self.active)
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters:
                parameter.requires_grad_(index in active)
                if index not in active:
                    parameter.grad = None
        if self._cut is not None:
            self._cut.remove()
            self._cut = None
        lowest = self.layers[self.active[0]].module
        if len(active) < len(self.layers) and not _trains_below(self.model, lowest):
            self._cut = lowest.register_forward_pre_hook(_detach_input, with_kwargs=True)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError unless the optimizer holds every adapter."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for layer in self.layers:
            if any(id(parameter) not in held for parameter in layer.parameters):
                raise ValueError(f"IST: expected an optimizer that holds every adapter, got one without {layer.name}'s")

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as this one would, in lists and tensors."""
        return {
            "layers": [layer.name for layer in self.layers],
            "unimportance": self.unimportance.clone(),
            "active": list(self.active),
            "step": self.step,
            "updates": list(self.updates),
            "history": list(self.history),
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
        self._generator.set_state(state["generator"])
        self.unimportance = state["unimportance"].clone()
        self.step, self.updates = state["step"], list(state["updates"])
        self.history = [tuple(entry) for entry in state["history"]]
        self.set_active(state["active"])

    def __str__(self) -> str:
        """A table: how often each layer trained, and how important it is."""
        lines = [f"{self.step} steps, {len(self.history)} estimates of importance"]
        width = max(len(layer.name) for layer in self.layers)
        for layer, updates, value in zip(self.layers, self.updates, self.importance.tolist()):
            share = updates / self.step if self.step else 0.0
            lines.append(f"  {layer.name:<{width}}  trained {updates:>5} ({share:>4.0%})  importance {value:.3f}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Importance over time as a heat map in the data's own range, and how often each layer trained (PNG).

        Raises:
            ValueError: before the first estimate.
        """
        from .plot import draw  # needs matplotlib, which the package does not

        if not self.history:
            raise ValueError("IST.plot: expected at least one estimate of importance, got none")
        return draw(self, Path(path))


def _trains_below(model: nn.Module, block: nn.Module) -> bool:
    """Whether a parameter that comes before `block` in the model requires a gradient."""
    for module in model.modules():
        if module is block:
            return False
        if any(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None):
            return True
    return True


def _detach_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, torch.Tensor) else value

    return tuple(map(detached, args)), {name: detached(value) for name, value in kwargs.items()}


def _loss_of(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    return model(**batch).loss
