"""The refusals of the public functions: one line that says what was expected and what came, before anything runs."""

from __future__ import annotations

import torch

from ..core.messages import describe


def check(op: str, x: torch.Tensor, projections: tuple, dropout_p: float, adapter_precision: str, *_: object) -> None:
    """Raise ValueError unless the arguments of `op` fit together (see `lora_linear`)."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: expected dropout_p between 0 and 1, got {dropout_p}")
    if adapter_precision != "default" and adapter_precision != "high":
        raise ValueError(f"{op}: expected adapter_precision 'default' or 'high', got {adapter_precision!r}")
    if not projections:
        raise ValueError(f"{op}: expected at least one projection, got none")
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape or not dtype.is_floating_point:
        raise ValueError(f"{op}: expected a floating-point x of shape [..., K], got {describe(x)}")
    K, adapter_dtype = shape[-1], projections[0][1].dtype
    if adapter_dtype != dtype and (adapter_dtype != torch.float32 or dtype == torch.float64):
        raise ValueError(f"{op}: expected lora_A in x's dtype {dtype} or float32, got {adapter_dtype}")
    for projection in projections:
        weight, lora_A, lora_B, scaling, bias = projection
        w, a, b = weight.shape, lora_A.shape, lora_B.shape
        # Asked as one question, since it is asked at every call; what is wrong is found out only if something is.
        if not (
            len(w) == len(a) == len(b) == 2
            and K == w[1] == a[1]
            and b[0] == w[0]
            and b[1] == a[0] != 0
            and weight.dtype == dtype
            and lora_A.dtype == lora_B.dtype == adapter_dtype
            and weight.device == lora_A.device == lora_B.device == device
            and (bias is None or (bias.shape == (w[0],) and bias.dtype == dtype and bias.device == device))
        ):
            raise ValueError(f"{op}: {_complaint(x, projection, adapter_dtype)}")
        if not isinstance(scaling, (float, int)):
            _check_scaling(op, x, scaling)


def _complaint(x: torch.Tensor, projection: tuple, adapter_dtype: torch.dtype) -> str:
    weight, lora_A, lora_B, _, bias = projection
    K, dtype = x.shape[-1], x.dtype
    if weight.dim() != 2 or weight.shape[1] != K or weight.dtype != dtype:
        return f"expected weight [N, {K}] in x's dtype {dtype}, got {describe(weight)}"
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
        return f"expected lora_A [R, {K}] with R ≥ 1, got {describe(lora_A)}"
    N, R = weight.shape[0], lora_A.shape[0]
    if lora_B.shape != (N, R):
        return f"expected lora_B [{N}, {R}], got {describe(lora_B)}"
    if lora_A.dtype != adapter_dtype or lora_B.dtype != adapter_dtype:
        return f"expected adapters of one dtype, got {describe(lora_A)} and {describe(lora_B)}"
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype):
        return f"expected bias [{N}] in x's dtype {dtype}, got {describe(bias)}"
    given = [tensor for tensor in (weight, lora_A, lora_B, bias) if tensor is not None]
    elsewhere = next(tensor for tensor in given if tensor.device != x.device)
    return f"expected every tensor on x's device {x.device}, got {describe(elsewhere)}"


def _check_scaling(op: str, x: torch.Tensor, scaling: object) -> None:
    if not isinstance(scaling, torch.Tensor):
        raise ValueError(f"{op}: expected scaling as a float or a tensor, got {type(scaling).__name__}")
    if scaling.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: expected a scaling that takes no gradient, got one that requires it")
    if scaling.dim() and not is_row_scaling(scaling, x):
        raise ValueError(
            f"{op}: expected scaling of shape [] or {list(x.shape[:-1])} (or 1 where all rows share a value), "
            f"got {describe(scaling)}"
        )
    if scaling.device != x.device or not scaling.is_floating_point():
        raise ValueError(f"{op}: expected a floating-point scaling on x's device {x.device}, got {describe(scaling)}")


def is_row_scaling(scaling: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `scaling` has a value for each row of x, or one that rows share: shape x.shape[:-1], or 1 in places."""
    rows = x.shape[:-1]
    return len(scaling.shape) == len(rows) and all(size in (1, row) for size, row in zip(scaling.shape, rows))
