"""Scores the entries of weights by how much they are worth to a sparse delta."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..ops.core.messages import describe

#: Entries of a gradient that are added in one go.
PIECE = 1 << 22


def linear_weights(model: nn.Module, targets: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return the weight of every nn.Linear of a model, by the module's name; of that class, not of one derived from it.

    Args:
        targets: ends of names, as "q_proj" or "mlp.up_proj"; None for all but an output embedding that shares the
            weight of an nn.Embedding.

    Returns:
        The parameters themselves, in the model's order. One that several modules share is there once, under the first
        name.

    Raises:
        ValueError: a target matches nothing, or there is no nn.Linear.
    """
    linears = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    if targets is None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        linears = {name: weight for name, weight in linears.items() if id(weight) not in embeddings}
        if not linears:
            raise ValueError(f"expected a model with nn.Linear modules, got {type(model).__name__} without")
    else:
        chosen = set()
        for target in [targets] if isinstance(targets, str) else targets:
            matches = {name for name in linears if name == target or name.endswith(f".{target}")}
            if not matches:
                raise ValueError(f"expected targets that are ends of names of nn.Linear modules, got {target!r}")
            chosen |= matches
        linears = {name: weight for name, weight in linears.items() if name in chosen}
    once: dict[int, str] = {}
    for name, weight in linears.items():
        once.setdefault(id(weight), name)
    return {name: linears[name] for name in once.values()}


def magnitude(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """|W|, in the dtype of each weight."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


def change(weights: Mapping[str, torch.Tensor], pretrained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """|W - W₀|, float32: how far each entry has moved in a first, dense training (LT-SFT, Ansell et al. 2022).

    Args:
        pretrained: W₀ for at least the same names, on any device.

    Raises:
        ValueError: a name is missing, or a shape differs.
    """
    scores = {}
    for name, weight in weights.items():
        if name not in pretrained:
            raise ValueError(f"expected a pretrained weight for each name, got none for {name!r}")
        before = pretrained[name].detach()
        if before.shape != weight.shape:
            raise ValueError(f"expected a pretrained {name!r} of {list(weight.shape)}, got {describe(before)}")
        now = weight.detach().to(torch.float32, copy=True)
        scores[name] = now.sub_(before.to(weight.device)).abs_()
    return scores


def gradient(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    batches: Iterable[Any],
    *,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """|Σ over batches of ∂loss/∂W|, float32, as in SHiRA-Grad (Bhardwaj et al. 2024): the absolute value of the sum, so
    that gradients that contradict each other cancel.

    The model runs in the mode it is in. What of it requires gradients, and those that it has, are put back, also if
    `loss` raises. A weight that the loss never reaches scores 0, with a warning.

    Args:
        weights: parameters of the model, frozen or not.
        loss: (model, batch) → a scalar.
        progress: show a bar; needs tqdm.

    Raises:
        ValueError: a weight is not the model's, there is no batch, or the loss is no scalar that depends on a weight.
    """
    sums, _ = _accumulated(model, weights, loss, batches, torch.Tensor.add_, True, "gradient", progress)
    return {name: each.abs_() for name, each in sums.items()}


def fisher(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    examples: Iterable[Any],
    *,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """The mean over examples of (∂loss/∂W)², float32: the diagonal of the empirical Fisher information that FISH mask
    goes by (Sung, Nair and Raffel 2021, eq. 4).

    The square is of the gradient of each example alone: examples come one by one, or what is meant to be a sum of
    squares becomes a square of sums. Otherwise as `gradient`.

    Args:
        weights: parameters of the model, frozen or not.
        loss: (model, example) → -log p(y | x), a scalar.
        examples: each a batch of one.
        progress: show a bar; needs tqdm.

    Raises:
        ValueError: as `gradient`; or a weight gets its gradient in parts, as reentrant checkpointing makes it where one
            weight serves several layers.
    """

    def add_square(sums: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return sums.addcmul_(gradient, gradient)

    sums, count = _accumulated(model, weights, loss, examples, add_square, False, "Fisher information", progress)
    return {name: each.div_(count) for name, each in sums.items()}


def _accumulated(
    model, weights, loss, batches, add: Callable[[torch.Tensor, torch.Tensor], Any], in_parts: bool, what: str, progress
) -> tuple[dict[str, torch.Tensor], int]:
    """Return the sums that `add` makes of the gradients of all batches, float32 by name, and the number of batches.

    Args:
        add: (sums, gradient), both float32, changes the sums in place; is given rows at a time.
        in_parts: whether a gradient may come in several parts.
    """
    owned = {id(parameter) for parameter in model.parameters()}
    for name, weight in weights.items():
        if id(weight) not in owned or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"expected parameters [N, K] of the model, got {describe(weight)} for {name!r}")
    names = {id(weight): name for name, weight in weights.items()}
    if len(names) < len(weights):
        raise ValueError("expected different weights, got one under two names")
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    seen: set[str] = set()
    reached: set[str] = set()

    def take(parameter: nn.Parameter) -> None:
        name = names.get(id(parameter))
        if name is not None:
            if name in seen and not in_parts:
                raise ValueError(f"expected one gradient of {name!r} for each example, got it in parts")
            seen.add(name)
            rows = max(1, PIECE // max(1, parameter.shape[1]))
            for some, part in zip(sums[name].split(rows), parameter.grad.split(rows)):
                add(some, part.float())
        parameter.grad = None  # at once, before the next one is computed

    if progress:
        from tqdm import tqdm

        batches = tqdm(batches, desc=what)
    count = 0
    with _gradients_go_to(take, model, weights.values()), torch.enable_grad():
        for batch in batches:
            seen.clear()
            value = loss(model, batch)
            if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
                got = describe(value) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"expected the loss as a scalar that depends on the weights, got {got}")
            value.backward()
            reached |= seen
            count += 1
    if not count:
        raise ValueError("expected at least one batch, got none")
    unreached = [name for name in weights if name not in reached]
    if unreached:
        warnings.warn(f"no gradient reached {len(unreached)} weights, as {unreached[0]!r}: they score 0", stacklevel=3)
    return sums, count


@contextlib.contextmanager
def _gradients_go_to(
    take: Callable[[nn.Parameter], None], model: nn.Module, weights: Iterable[torch.Tensor]
) -> Iterator[None]:
    """Let the weights require gradients inside the block, and hand every parameter to `take` as soon as its gradient is
    there. Afterwards all is as before.

    Other parameters that require a gradient still do: with reentrant checkpointing the weights may get theirs only
    because the embeddings do.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for parameter, _, _ in before:
            parameter.grad = None
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(take))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad
