"""Plain PyTorch in place of the native CUDA kernels, so that what puts them together is tested without a GPU: it takes
what they take, and refuses what they refuse. `csrc/selftest` proves the kernels themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from peft_kernels import _native, backends
from peft_kernels.ops.core import dropout

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def standing_in(*kernels: Callable) -> Iterator[None]:
    """The backend "cuda" on CPU tensors, by these in place of the native ops of their names."""
    assert _native.load(), _native.why_not()
    library = torch.library.Library("peft_kernels_native", "IMPL")
    for kernel in kernels:
        library.impl(kernel.__name__, kernel, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_why_not_here", lambda *_: "")  # on CPU tensors
        yield
    library._destroy()


def taken(matrix, height, width, dtype):
    """As `check_operand` of csrc/common/operands.h."""
    assert matrix.shape == (height, width) and matrix.dtype == dtype and dtype in HALVES
    if matrix.numel():
        assert matrix.data_ptr() % 16 == 0 and (width == 1 or matrix.stride(1) == 1)
        assert height == 1 or (matrix.stride(0) % 8 == 0 and matrix.stride(0) >= width)
    return matrix.float()


def parts(left, right, count):
    """left·right in `count` partial sums over the depth, float32."""
    pieces = zip(left.tensor_split(count, dim=1), right.tensor_split(count, dim=0))
    return torch.stack([one @ other for one, other in pieces])


# --- The kernels ---------------------------------------------------------------------------------------------------


def lora_gemm(lefts, rights, low_lefts, low_rights, keep, bias, by_feature):
    assert 1 <= len(lefts) == len(rights) == len(low_lefts) == len(low_rights) <= 3
    M, N, dtype = lefts[0].shape[0], rights[0].shape[0 if by_feature else 1], lefts[0].dtype

    assert len(keep) in (0, 1, len(lefts))

    def product(left, right):
        K = left.shape[1]
        right = taken(right, *((N, K) if by_feature else (K, N)), dtype)
        return taken(left, M, K, dtype) @ (right.mT if by_feature else right)

    low = [product(left, right) for left, right in zip(low_lefts, low_rights)]
    for j, mask in enumerate(keep * len(low) if len(keep) == 1 else keep):
        assert mask.shape == (M, dropout.mask_bytes(N)) and mask.is_contiguous()
        low[j] = low[j] * dropout.unpack_mask(mask, N, torch.float32)
    out = sum(low) + sum(map(product, lefts, rights))
    if bias is not None:
        assert bias.shape == (N,) and bias.is_contiguous() and bias.dtype == dtype
        out = out + bias
    return out.to(dtype)


def lora_forward(x, weight, lora_A, lora_B, row_scale, scale, bias):
    """As csrc/ops/lora_linear/forward.cu."""
    (M, K), N, R, dtype = x.shape, weight.shape[0], lora_A.shape[0], x.dtype
    assert K >= 1 and N >= 1 and N % 8 == 0 and 1 <= R <= 64
    wide, lora_A = taken(x, M, K, dtype), taken(lora_A, R, K, dtype)
    s = x.new_zeros(M, -(-R // 8) * 8)
    s[:, :R] = _reduce_partials((wide @ lora_A.mT)[None], row_scale, scale, dtype)
    y = wide @ taken(weight, N, K, dtype).mT + s[:, :R].float() @ taken(lora_B, N, R, dtype).mT
    if bias is not None:
        assert bias.shape == (N,) and bias.is_contiguous() and bias.dtype == dtype
        y = y + bias
    return y.to(dtype), s


def lora_shrink(wide, narrow, seed, threshold, streams, mask, by_feature):
    (M, K), dtype = wide.shape, wide.dtype
    C = narrow.shape[0 if by_feature else 1]
    narrow = taken(narrow, *((C, K) if by_feature else (K, C)), dtype)
    narrow = narrow.mT if by_feature else narrow
    wide = taken(wide, M, K, dtype)
    if seed is None:
        assert mask is None
        return parts(wide, narrow, 2)
    assert by_feature and C % streams == 0
    drawn = dropout.draw_mask_by_torch(seed, M, K, (threshold + 32768) / 65536, streams)
    if mask is not None:
        mask.copy_(drawn)
    kept = [wide * dropout.unpack_mask(bits, K, torch.float32) for bits in drawn]
    return torch.cat([parts(one, a, 2) for one, a in zip(kept, narrow.tensor_split(streams, dim=1))], dim=2)


def lora_outer(wide, narrow, right, keep, streams, transposed):
    (M, F), all_ranks, dtype = wide.shape, narrow.shape[1], wide.dtype
    R = all_ranks // streams
    largest = 64 if right is None else 32
    assert largest >= R
    assert streams == 1 or (transposed and right is None and all_ranks % (8 * streams) == 0)
    wide, narrow = taken(wide, M, F, dtype), taken(narrow, M, all_ranks, dtype)
    shrunk = wide.new_empty(0, M, R) if right is None else parts(wide, taken(right, F, R, dtype), 3)
    kept = [wide] * streams
    if keep is not None:
        assert streams % len(keep) == 0 and keep.shape[1:] == (M, dropout.mask_bytes(F)) and keep.is_contiguous()
        assert right is None
        masks = [dropout.unpack_mask(mask, F, torch.float32) for mask in keep]
        kept = [wide * masks[stream * len(masks) // streams] for stream in range(streams)]
    sums = torch.cat([parts(one.mT, part, 2) for one, part in zip(kept, narrow.split(max(R, 1), dim=1))], dim=2)
    return sums.mT.contiguous() if transposed else sums, shrunk


def lora_grads(left, right, low_left, low_right, keep, by_feature, wide, narrow, wide_keep, streams):
    out = lora_gemm(left, right, low_left, low_right, keep, None, by_feature)
    return out, lora_outer(wide, narrow, None, wide_keep, streams, True)[0]


def sparse_gathered(dy, x, row_starts, columns, n, m):
    (M, N), K = dy.shape, x.shape[1]
    dy, x = taken(dy, M, N, dy.dtype), taken(x, M, K, dy.dtype)
    if row_starts is not None:
        assert row_starts.shape == (N + 1,) and row_starts.is_contiguous()
        assert row_starts.dtype in (torch.int32, torch.int64)
        assert columns.dim() == 1 and columns.is_contiguous() and columns.dtype in (torch.int16, torch.int32)
        rows = torch.repeat_interleave(torch.arange(N), row_starts.diff())
    else:
        assert columns.dtype == torch.int8 and columns.is_contiguous() and columns.numel() == N * (K // m) * n
        rows = torch.arange(N).repeat_interleave(K // m * n)
        columns = (torch.arange(K // m)[:, None] * m + columns.view(N, K // m, n)).flatten()
    if M == 0 or columns.numel() == 0:
        return dy.new_empty(0, columns.numel())
    return parts(dy.mT, x, 2 if M > 8 else 1)[:, rows, columns.long()]


def reduce_partials(partials, row_scale, scale, out_dtype):
    assert len(partials) == len(row_scale) == len(scale) >= 1
    return [_reduce_partials(*one, out_dtype) for one in zip(partials, row_scale, scale)]


def _reduce_partials(partials, row_scale, scale, out_dtype):
    _, M, R = partials.shape
    assert partials.dtype == torch.float32
    if M * R:
        assert R == 1 or partials.stride(2) == 1
        assert M == 1 or partials.stride(1) == R or (partials.stride(1) > R and R % 4 == 0)
    total = partials.sum(0) * scale
    if row_scale is not None:
        assert row_scale.shape == (M,) and row_scale.is_contiguous() and row_scale.dtype == torch.float32
        total = total * row_scale[:, None]
    return total.to(out_dtype)
