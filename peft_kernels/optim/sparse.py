"""AdamW and SGD for the values of `nn.SparseDeltaLinear`: their step ends with the new weight."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .. import backends
from ..nn import SparseDeltaLinear
from ..ops.core.messages import describe

Params = nn.Module | Iterable[nn.Parameter] | Iterable[nn.Module] | Iterable[dict[str, Any]]


class _WritesWeights:
    """Adds to torch's optimizers: layers as parameters, decay of the whole weight, a step that writes the weight."""

    def _begin(self, params: Params, decay: str) -> Iterable:
        """Return the parameters for torch's optimizer: values in place of layers."""
        if decay not in ("delta", "weight"):
            raise ValueError(f"expected decay 'delta' or 'weight', got {decay!r}")
        self._decays_weight = decay == "weight"
        self._layers: dict[nn.Parameter, SparseDeltaLinear] = {}
        if isinstance(params, nn.Module):
            return self._leaves([params])
        params = list(params)
        if params and isinstance(params[0], dict):
            return [group | {"params": self._leaves(group["params"])} for group in params]
        return self._leaves(params)

    def _leaves(self, params: nn.Parameter | nn.Module | Iterable) -> list[nn.Parameter]:
        found = []
        for item in [params] if isinstance(params, (nn.Module, torch.Tensor)) else params:
            if not isinstance(item, nn.Module):
                if isinstance(item, torch.Tensor) and not item.is_floating_point():
                    given = f"a {type(item).__name__} {describe(item)}"
                    raise ValueError(f"expected floating-point parameters, got {given}")
                found.append(item)
                continue
            layers = [module for module in item.modules() if isinstance(module, SparseDeltaLinear)]
            layers = [layer for layer in layers if layer.active is not None]
            if not layers:
                raise ValueError(f"expected a SparseDeltaLinear, or a module with some, got {type(item).__name__}")
            for layer in layers:
                self._layers[layer.values] = layer
                found.append(layer.values)
        return found

    def _written(self) -> Iterator[tuple[dict[str, Any], SparseDeltaLinear]]:
        """Yield the layers whose values this step changes, each with its group."""
        for group in self.param_groups:
            for values in group["params"]:
                layer = self._layers.get(values)
                if layer is not None and values.grad is not None and layer.active and layer.values is values:
                    yield group, layer

    @torch.no_grad()
    def step(self, closure=None):
        """Make one step, after which the weights hold the new values. Returns what `closure` returns, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        written = [(group, layer, self._has_kernel(layer)) for group, layer in self._written()]
        grads = [layer.values.grad for _, layer, _ in written]
        for group, layer, has_kernel in written:
            if has_kernel:
                layer.values.grad = None  # torch's step leaves it out
            elif self._decays_weight and group["weight_decay"]:  # torch's own step decays Δ by as much
                self._decay_base(group, layer)
        self._torch_step()
        for (_, layer, _), grad in zip(written, grads):
            layer.values.grad = grad
        self._step_kernel([(group, layer) for group, layer, has_kernel in written if has_kernel])
        for _, layer, has_kernel in written:
            layer.write(changed=True, done=has_kernel)
        return loss

    @staticmethod
    def _has_kernel(layer: SparseDeltaLinear) -> bool:
        return False

    def _step_kernel(self, stepped: list[tuple[dict[str, Any], SparseDeltaLinear]]) -> None:
        """Step the layers for which this optimizer has a kernel."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of torch's own, without its choice of torch's kernels.

        Raises:
            ValueError: for the state of an AdamW with amsgrad, or of other groups; nothing is loaded then.
        """
        mine, theirs = len(self.param_groups), len(state_dict["param_groups"])
        if mine != theirs:
            raise ValueError(f"expected the state of an optimizer with {mine} groups, got {theirs}")
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("expected the state of an optimizer without amsgrad, got one with it")
        own = ("fused", "foreach", "capturable")
        groups = [
            saved | {key: group[key] for key in own if key in group}
            for saved, group in zip(state_dict["param_groups"], self.param_groups)
        ]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_layers": self._layers, "_decays_weight": self._decays_weight}


class SparseAdamW(_WritesWeights, torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, 2019) on sparse deltas.

    `values` and both moments are float32; the weight is W₀ + Δ, rounded once to its dtype, so that updates too small
    for a 16-bit weight add up in the master. 8 bytes a value beside the layer's own; none for a frozen entry.

    Args:
        params: a model (the active values of every `SparseDeltaLinear` in it), an iterable of layers and parameters, or
            of groups of them as dicts. Other parameters take plain AdamW.
        lr: a float, or a tensor with `capturable`.
        betas, eps, maximize: as `torch.optim.AdamW`.
        weight_decay: decoupled; 0 by default.
        decay: what decays: "delta" (Δ towards 0, so the weight towards W₀) or "weight" (W₀ + Δ towards 0, as in dense
            training).
        capturable: may be captured in a CUDA graph.

    On a GPU with Triton one launch steps all deltas and writes all weights. State, schedulers, clipping and GradScaler
    are torch's: a state_dict is `torch.optim.AdamW`'s.

    Raises:
        ValueError: for a module without such layers, or another `decay`.
    """

    _torch_step = inspect.unwrap(torch.optim.AdamW.step)  # without the hooks, which run around our own

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay: str = "delta",
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        params = self._begin(params, decay)
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, capturable=capturable, fused=True)
        self._step_supports_amp_scaling = False  # GradScaler unscales and skips: weights are written here too
        self._tables = None

    @staticmethod
    def _has_kernel(layer: SparseDeltaLinear) -> bool:
        return backends.choose("sparse_delta_linear", layer.weight, layer.layout.kind) == "triton"

    def _step_kernel(self, stepped: list[tuple[dict[str, Any], SparseDeltaLinear]]) -> None:
        if not stepped:
            return
        from ..ops.sparse_delta.triton_step import Stepped, Tables, adamw  # needs Triton, which the package does not

        self._tables = self._tables or Tables()
        for group in self.param_groups:
            layers = [layer for owner, layer in stepped if owner is group]
            if not layers:
                continue
            params, grads, averages, squares, steps = [], [], [], [], []
            self._init_group({**group, "params": [layer.values for layer in layers]}, params, grads, averages, squares,
                             [], steps)  # fmt: skip
            torch._foreach_add_(steps, 1)
            deltas = [
                Stepped(values.data, grad.contiguous(), *state, layer.base, layer.weight, layer.layout)
                for values, grad, *state, layer in zip(params, grads, averages, squares, steps, layers)
            ]
            adamw(
                deltas, group["lr"], group["betas"], group["eps"], group["weight_decay"], self._decays_weight,
                group["maximize"], self._tables,
            )  # fmt: skip
            for values in params:
                torch.autograd.graph.increment_version(values)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tables": None}  # addresses in this process

    @staticmethod
    def _decay_base(group: dict[str, Any], layer: SparseDeltaLinear) -> None:
        share = group["lr"] * group["weight_decay"]
        layer.values.sub_(layer.base * (share / (1 - share)))  # torch then takes `share` of the sum away


class SparseSGD(_WritesWeights, torch.optim.SGD):
    """SGD with momentum on sparse deltas.

    Args:
        params, weight_decay, decay: as :class:`SparseAdamW`; as in torch's SGD, decay is added to the gradient.
        lr, momentum, dampening, nesterov, maximize: as `torch.optim.SGD`.

    Raises:
        ValueError: for a module without such layers, or another `decay`.
    """

    _torch_step = inspect.unwrap(torch.optim.SGD.step)

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decay: str = "delta",
        maximize: bool = False,
    ) -> None:
        params = self._begin(params, decay)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, fused=True)
        self._step_supports_amp_scaling = False

    @staticmethod
    def _decay_base(group: dict[str, Any], layer: SparseDeltaLinear) -> None:
        sign = -1.0 if group["maximize"] else 1.0
        layer.values.grad = layer.values.grad.add(layer.base, alpha=sign * group["weight_decay"])
