"""The problems that `python -m peft_kernels tune` runs for each choice in `configs.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.machine import architecture
from ..core.problem import Inputs, Problem
from . import configs
from .layout import SparseLayout
from .reference import gather_columns, grad_values
from .triton_backward import gathered_grad, sampled_grad, thin_grad

_SAMPLED, _BLOCKS = 0.001, 0.01  # densities of what is sampled, and of blocks


def _gathered(inputs: Inputs, N, K, per_64, **_) -> Problem:
    return _of_layout(inputs, _entries(inputs, N, K, per_64 / 64), gathered_grad)


def _thin(inputs: Inputs, N, K, **_) -> Problem:
    """Rows where K is anything wide, columns where N is, else blocks of N × K."""
    side = inputs.K
    shape = side, side
    if configs.THIN.most == K:
        layout = SparseLayout.rows(shape, inputs.some(N, side))
    elif configs.THIN.most == N:
        layout = SparseLayout.columns(shape, inputs.some(K, side))
    else:
        count = side // N * (side // K)
        layout = SparseLayout.blocks(shape, (N, K), inputs.some(max(1, int(_BLOCKS * count)), count))
    return _of_layout(inputs, layout, thin_grad)


def _sampled(inputs: Inputs, element_size) -> Problem:
    return _of_layout(inputs, _entries(inputs, inputs.K, inputs.K, _SAMPLED), sampled_grad)


def _sampled_up_to(inputs: Inputs, at, table, element_size) -> Problem:
    N, arch = inputs.K, architecture(inputs.device)
    layout = _entries(inputs, N, N, *at)

    def gradient(dy, x, layout, dtype, path):
        if path == "sampled":
            return sampled_grad(dy, x, layout, dtype, configs.sampled_tile(element_size, table=table))
        tile = configs.grad_tile(N, N, layout.density, element_size, arch, table=table)
        return gathered_grad(dy, x, layout, dtype, tile)

    return _of_layout(inputs, layout, gradient)


def _of_layout(inputs: Inputs, layout: SparseLayout, gradient: Callable[..., torch.Tensor]) -> Problem:
    """The gradient of a layout's values by `gradient(dy, x, layout, dtype, candidate)`."""
    N, K = layout.shape
    dy, x = inputs.normal(inputs.K, N), inputs.normal(inputs.K, K)
    x = gather_columns(x, layout) if layout.kind == "columns" else x
    return Problem(
        lambda candidate: (gradient(dy, x, layout, dy.dtype, candidate),),
        lambda dy, x: (grad_values(dy, x, layout, dy.dtype),),
        (dy, x),
    )


def _entries(inputs: Inputs, N: int, K: int, density: float) -> SparseLayout:
    return SparseLayout.from_mask(torch.rand(N, K, generator=inputs.generator, device=inputs.device) < density)


PROBLEMS = {
    "grad_tile": _gathered,
    "thin_tile": _thin,
    "sampled_tile": _sampled,
    "sampled_up_to": _sampled_up_to,
}
