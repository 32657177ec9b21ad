"""Cross-entropy that saves nothing beside the logits, and the loss of causal language models by it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from ...ops.core.transforms import backward_of, is_transformed

#: Bytes of float32 values in use at a time beside logits and gradient; on a CPU they fit in its cache.
PIECE_BYTES, CACHED_BYTES = 1 << 28, 1 << 22


class CrossEntropy(torch.autograd.Function):
    """Σ over rows t of log Σ_v exp(logits[t, v]) − logits[t, targets[t]].

    torch's own keeps log softmax(logits), and its backward makes two more tensors of that size, all of them in float32
    when logits were cast for it. This one keeps the logits themselves and log Σ exp of each row, computes in float32 a
    piece of rows at a time, and makes the gradient in the dtype of the logits:

        ∂/∂logits[t, v] = exp(logits[t, v] − log Σ exp) − [v = targets[t]]

    Args:
        logits: [rows, vocabulary], floating point.
        targets: int64 [rows].
        ignored: the target of rows that do not count.

    Returns:
        the sum, []: float64 for float64 logits, else float32. It can be differentiated once.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = torch.cat([piece.to(dtype).logsumexp(1) for piece in logits.split(_rows(logits))])
        counts = targets != ignored
        places = targets.where(counts, 0)[:, None]
        ctx.save_for_backward(logits, sums, places, counts)
        return (sums - logits.gather(1, places).squeeze(1)).where(counts, 0).sum()

    @staticmethod
    @backward_of("logits_at_labels")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, sums, places, counts = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        minus_one = sums.new_full((), -1.0)
        columns = (sums[:, None], places, (grad * counts)[:, None])
        for piece, into, total, place, weight in zip(
            *(tensor.split(_rows(logits)) for tensor in (logits, grad_logits, *columns))
        ):
            wide = into if into.dtype == sums.dtype else torch.empty_like(into, dtype=sums.dtype)
            torch.sub(piece, total, out=wide)
            wide.exp_().scatter_add_(1, place, minus_one.expand_as(place)).mul_(weight)
            if wide is not into:
                into.copy_(wide)
        return grad_logits, None, None


def _rows(logits: torch.Tensor) -> int:
    """Return how many rows a piece has."""
    return max(1, (CACHED_BYTES if logits.is_cpu else PIECE_BYTES) // (4 * logits.shape[1]))


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Compute transformers' ForCausalLMLoss, through `CrossEntropy` where that takes less memory: not under
    torch.compile, which does as well by itself."""
    plain = type(logits) is torch.Tensor and not (torch.compiler.is_compiling() or is_transformed())
    if not (plain and logits.requires_grad):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    targets = shift_labels.reshape(-1).to(logits.device)
    total = CrossEntropy.apply(logits.reshape(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
