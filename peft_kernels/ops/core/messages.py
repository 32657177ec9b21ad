"""How tensors are named in what a user reads."""

from __future__ import annotations

import torch


def describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
