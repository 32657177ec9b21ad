"""The providers of `sparse_delta`, which train a few entries of one linear layer's weight, and their check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import peft_kernels as pk
from peft_kernels import backends
from peft_kernels.testing import assert_within_eager
from peft_kernels.testing.sparse_delta import SparseCase, eager, float64_reference

from .providers import why_not_installed
from .providers.ours import why_not

BARE, DENSE, SCATTER = "bare linear", "dense, masked", "clone + scatter"
SHIRA, ACCELERATED = "PEFT SHiRA", "PEFT SHiRA, accelerated"
#: The settings of every AdamW. It divides by √v + ε: the usual ε would let a weight hang on the rounding of tiny
#: gradients.
LR, EPS = 1e-3, 1.0
CHECKED_STEPS = 2  # the fewest in which both moments matter
#: The factor on the error of eager PyTorch in float32. MKL adds up a product of six columns in one chain, where it
#: splits a wide one: seen to be 3.2 times as far off at the most, in the gradients of columns.
OTHER_ORDER = 2.0


class Lane:
    """A provider on one case; this one is the bare linear, which trains nothing.

    Attributes:
        x: its own leaf, so that dx is computed, as in the middle of a model.
        optimizer: the optimizer of what it trains.
        kept: all that stays between two steps, the weight among it, the optimizer's state not.
    """

    name = BARE
    stepped = "weight"  # which result of steps it is held to

    def __init__(self, case: SparseCase) -> None:
        self.case, self.x = case, case.x.clone().requires_grad_()
        self.optimizer: torch.optim.Optimizer | None = None
        self.kept = [case.weight]

    def train(self, leaf: torch.Tensor) -> None:
        self.trained = leaf
        self.optimizer = torch.optim.AdamW([leaf], lr=LR, eps=EPS, weight_decay=0.0, fused=True)

    def forward(self) -> torch.Tensor:
        return F.linear(self.x, self.case.weight)

    def backward(self, y: torch.Tensor, dy: torch.Tensor) -> None:
        y.backward(dy)

    def update(self) -> None:
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.x.grad = None

    def step(self, mark: Callable[[], None] = lambda: None) -> None:
        """Make a step; `mark` is called at the end of forward, of backward, and of the update."""
        y = self.forward()
        mark()
        self.backward(y, self.case.dy)
        del y
        mark()
        self.update()
        mark()

    def gradient(self) -> torch.Tensor:
        """Return the gradient of the values, [nnz] in the layout's order."""
        return self.trained.grad

    @torch.no_grad()
    def weight(self) -> torch.Tensor:
        """Return W + Δ as it is now."""
        return self.case.layout.put_(self.case.weight.clone(), self.case.layout.take(self.case.weight) + self.trained)

    def held_bytes(self) -> int:
        """Count the bytes of the weight, what trains, the optimizer's state, and what says which entries train."""
        states = self.optimizer.state.values() if self.optimizer else ()
        kept = {t.data_ptr(): t.nbytes for t in (*self.kept, *(t for state in states for t in state.values()))}
        return sum(kept.values())


class DenseMasked(Lane):
    """Trains all of W with a bool mask over its gradient, as LT-SFT does: in place, with W and so torch's moments in
    W's own dtype. No dense training takes less time or memory, but a 16-bit W loses small updates, as in no other
    provider."""

    name, stepped = DENSE, "weight without a master"

    def __init__(self, case: SparseCase) -> None:
        super().__init__(case)
        self.frozen = ~case.layout.mask()
        values = case.layout.take(case.weight) + case.values
        self.train(case.layout.put_(case.weight.clone(), values).requires_grad_())
        self.kept = [self.trained, self.frozen]

    def forward(self) -> torch.Tensor:
        return F.linear(self.x, self.trained)

    def backward(self, y: torch.Tensor, dy: torch.Tensor) -> None:
        y.backward(dy)
        self.trained.grad.masked_fill_(self.frozen, 0)  # a product would make a float of the mask first

    def gradient(self) -> torch.Tensor:
        return self.case.layout.take(self.trained.grad)

    def weight(self) -> torch.Tensor:
        return self.trained.detach()


class CloneScatter(Lane):
    """Adds values into a clone of W, as SpIEL, RoSA and SHiRA do; autograd computes dW and gathers from it."""

    name = SCATTER

    def __init__(self, case: SparseCase) -> None:
        super().__init__(case)
        self.flat = case.layout.indices()
        self.train(case.values.clone().requires_grad_())
        self.kept += [self.trained, self.flat]

    def forward(self) -> torch.Tensor:
        weight = self.case.weight
        patched = weight.flatten().index_add(0, self.flat, self.trained.to(weight.dtype))  # which clones W
        return F.linear(self.x, patched.view(weight.shape))


class Shira(Lane):
    """Hugging Face PEFT's own layer, with its own defaults: r·(in + out) entries, float32 values."""

    name = SHIRA

    def __init__(self, case: SparseCase) -> None:
        from peft import ShiraConfig, get_peft_model

        super().__init__(case)
        N, K = case.layout.shape
        model = nn.Module()
        model.linear = nn.Linear(K, N, bias=False, device="meta")
        model.linear.weight = nn.Parameter(case.weight, requires_grad=False)
        config = ShiraConfig(r=case.layout.nnz // (N + K), target_modules=["linear"])
        config.mask_fn = lambda base_layer, r, **_: case.layout.mask().to(base_layer.weight.dtype)
        self.layer = get_peft_model(model, config).base_model.model.linear
        self.train(self.layer.shira_weight["default"])
        with torch.no_grad():
            self.trained.copy_(case.values)
        self.kept += [self.trained, self.layer.shira_indices["default"]]

    def forward(self) -> torch.Tensor:
        return self.layer(self.x)


class AcceleratedShira(Shira):
    name = ACCELERATED

    def __init__(self, case: SparseCase) -> None:
        super().__init__(case)
        pk.integrations.peft.accelerate(self.layer)
        layout, order = self.layer._positions["default"].found
        self.kept += [*layout.tensors.values(), *([] if order is None else [order])]


class Forced(Lane):
    """One of ours, by the backend that its name ends in."""

    def __init__(self, case: SparseCase, backend: str) -> None:
        super().__init__(case)
        self.name = f"{type(self).name}, {backend}"
        # Forcing a backend that is taken anyway only costs CPU time.
        chosen = backend in ("auto", backends.choose("sparse_delta_linear", case.x, case.layout.kind))
        self.forced = contextlib.nullcontext if chosen else lambda: pk.use_backend(backend)


class Ours(Forced):
    """`nn.SparseDeltaLinear` and `optim.SparseAdamW`: Δ stays in the weight."""

    name = "ours"

    def __init__(self, case: SparseCase, backend: str) -> None:
        super().__init__(case, backend)
        N, K = case.layout.shape
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(case.weight.clone())
        self.layer = pk.nn.SparseDeltaLinear.from_linear(linear, case.layout)
        self.trained = self.layer.values
        with torch.no_grad():
            self.trained.copy_(case.values)
        self.optimizer = pk.optim.SparseAdamW(self.layer, lr=LR, eps=EPS)
        self.kept = [*self.layer.parameters(), *self.layer.buffers()]

    def forward(self) -> torch.Tensor:
        with self.forced():
            return self.layer(self.x)

    def update(self) -> None:
        with self.forced():
            super().update()

    def weight(self) -> torch.Tensor:
        return self.layer.weight


class Apart(Forced):
    """`sparse_delta_linear`: Δ stays outside of the weight, which others may share. AdamW is torch's."""

    name = "ours, Δ apart"

    def __init__(self, case: SparseCase, backend: str) -> None:
        super().__init__(case, backend)
        self.train(case.values.clone().requires_grad_())
        self.kept += [self.trained, *case.layout.tensors.values()]

    def forward(self) -> torch.Tensor:
        with self.forced():
            return pk.sparse_delta_linear(self.x, self.case.weight, self.trained, self.case.layout)


def makers(
    device: str, shira: bool, dtype: torch.dtype = torch.float32, kind: str = "entries"
) -> dict[str, Callable[[SparseCase], Lane]]:
    """Map the names of providers to what makes them, for a layout of this kind, the bare linear first; ours on a GPU by
    each backend that takes it, on a CPU by what `auto` takes. `shira`: whether PEFT's SHiRA can have the layout."""
    kinds = [Lane, DenseMasked, CloneScatter, *([Shira, AcceleratedShira] if shira else [])]
    found: dict[str, Callable[[SparseCase], Lane]] = {kind.name: kind for kind in kinds}
    takes = backends.OPS["sparse_delta_linear"].backends
    on_gpu = [backend for backend in ("triton", "cuda", "reference") if takes[backend].includes(dtype, kind)]
    for backend in on_gpu if device == "cuda" else ("auto",):
        for lane in (Ours, Apart):
            found[f"{lane.name}, {backend}"] = partial(lane, backend=backend)
    return found


def absent(device: str) -> dict[str, str]:
    """Map the names of absent providers to the reason."""
    found = {name: why for name in (SHIRA, ACCELERATED) if (why := why_not_installed("peft"))}
    for backend in ("triton", "cuda") if device == "cuda" else ():
        if why := why_not(backend):
            found |= {f"{kind.name}, {backend}": why for kind in (Ours, Apart)}
    return found


def of_ours(providers: Iterable[str]) -> str:
    """Return the first of them that is `Ours`, by whichever backend; its bare name if there is none."""
    return next(
        (name for name in providers if name.startswith(Ours.name) and not name.startswith(Apart.name)), Ours.name
    )


# --- Check ---------------------------------------------------------------------------------------------------


def right_results(case: SparseCase) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compute the float64 reference, and eager PyTorch's results in the case's dtypes, whose error bounds others'."""
    wide = replace(case, **{name: getattr(case, name).double() for name in ("x", "weight", "values", "dy")})
    exact, yardstick = float64_reference(case) | _stepped(wide), eager(case) | _stepped(case)
    if case.x.dtype == torch.float32:
        yardstick = {name: torch.lerp(exact[name], y.double(), OTHER_ORDER).float() for name, y in yardstick.items()}
    return exact, yardstick


def check(lane: Lane, exact: dict[str, torch.Tensor], yardstick: dict[str, torch.Tensor]) -> str | None:
    """Say what is wrong, or None where output, gradients and the weight after some steps are within twice the
    yardstick's error (against float64) and no other entry has changed. The lane has made these steps then."""
    case, found = lane.case, {}
    if lane.optimizer is None:
        return None
    for number in range(CHECKED_STEPS):
        y = lane.forward()
        lane.backward(y, case.dy.roll(number, 0))
        if number == 0:
            found = {"y": y.detach(), "grad of x": lane.x.grad, "grad of values": lane.gradient().clone()}
        lane.update()
    weight, mask = lane.weight(), case.layout.mask()
    found[lane.stepped] = case.layout.take(weight)
    try:
        for name, value in found.items():
            assert_within_eager(name, value.to(yardstick[name].dtype), yardstick[name], exact[name])
    except AssertionError as error:
        return str(error)
    if not torch.equal(weight.masked_fill(mask, 0), case.weight.masked_fill(mask, 0)):
        return "weight: entries outside of the layout have changed"
    return None


def _stepped(case: SparseCase) -> dict[str, torch.Tensor]:
    """Return the weight at the layout's positions after some steps of AdamW, [nnz]: with float32 values as the master
    of Δ, and trained itself."""
    take, dtype = case.layout.take, case.weight.dtype
    base = take(case.weight)
    values, alone = case.values.clone(), (base + case.values).to(dtype)
    optimizer = torch.optim.AdamW([values, alone], lr=LR, eps=EPS, weight_decay=0.0)
    for number in range(CHECKED_STEPS):
        alone.grad = take(case.dy.roll(number, 0).t() @ case.x)
        values.grad = alone.grad.to(values.dtype)
        optimizer.step()
    return {"weight": base + values.to(dtype), "weight without a master": alone}
