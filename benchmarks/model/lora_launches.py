"""The launches of `lora_linear` and `lora_linear_shared_input` by provider. Each function is to be read beside the
provider's own code in `benchmarks/providers/`: a line here is a call there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from peft_kernels.ops.lora_linear import configs
from peft_kernels.ops.lora_linear.cuda import LARGEST_RANK_OF_FORWARD, LARGEST_RANK_OF_JOINT_PASS, LARGEST_RANK_OF_PASS

from ..providers import BARE, EAGER, PEFT
from .launches import F32, INDEX, Ceilings, Launch, Passes, beside, cast, elementwise, gemm, in_one, native_parts


class Layer(NamedTuple):
    """One projection: M tokens, K in_features, N out_features, rank R; size: bytes of an element; p of dropout."""

    M: int
    K: int
    N: int
    R: int
    size: int
    p: float

    # Bytes of x or dx, y or dy, A, B, S = D(x)·Aᵀ or dH = dy·B, and of a mask of a byte an element.
    x = property(lambda self: self.M * self.K * self.size)
    y = property(lambda self: self.M * self.N * self.size)
    A = property(lambda self: self.R * self.K * self.size)
    B = property(lambda self: self.N * self.R * self.size)
    S = property(lambda self: self.M * self.R * self.size)
    mask = property(lambda self: self.M * self.K)

    # The products that every provider is made of.
    def base(self, beta: int = 0) -> Launch:
        return gemm("x·Wᵀ", self.M, self.N, self.K, self.size, beta)

    def shrink(self) -> Launch:
        return gemm("S = D(x)·Aᵀ", self.M, self.R, self.K, self.size)

    def expand(self, beta: int = 0) -> Launch:
        return gemm("S·Bᵀ", self.M, self.N, self.R, self.size, beta)

    def base_dx(self, beta: int = 0) -> Launch:
        return gemm("dy·W", self.M, self.K, self.N, self.size, beta)

    def low_rank_dx(self, beta: int = 0) -> Launch:
        return gemm("dH·A", self.M, self.K, self.R, self.size, beta)

    def dH(self) -> Launch:
        return gemm("dH = dy·B", self.M, self.R, self.N, self.size)

    def dA(self) -> Launch:
        return gemm("dA = dHᵀ·D(x)", self.R, self.K, self.M, self.size)

    def dB(self) -> Launch:
        return gemm("dB = dyᵀ·S", self.N, self.R, self.M, self.size)

    def dropout(self, x: int) -> list[Launch]:
        """torch's, of `x` bytes: D(x) and a mask of a byte an element are written."""
        return [elementwise("D(x)", x, x + self.mask, self.M * self.K)] if self.p else []

    def dropout_dx(self, x: int) -> list[Launch]:
        return [elementwise("dx of D(x)", x + self.mask, x)] if self.p else []


# --- What others do ------------------------------------------------------------------------------------------


def bare(l: Layer) -> Passes:
    return Passes([l.base()], [l.base_dx()])


def eager(l: Layer) -> Passes:
    """Also PEFT's layer with adapters in the base's dtype, which is the same expression."""
    forward = [l.base(), *l.dropout(l.x), *_low_rank(l)]
    backward = [*_low_rank_backward(l), *l.dropout_dx(l.x), l.base_dx()]
    return Passes(forward, backward, parts_of_dx=2)


def _low_rank(l: Layer) -> list[Launch]:
    return [l.shrink(), l.expand(), elementwise("· scaling", l.y, l.y), elementwise("y +", 2 * l.y, l.y)]


def _low_rank_backward(l: Layer) -> list[Launch]:
    return [elementwise("dy · scaling", l.y, l.y), l.dB(), l.dH(), l.dA(), l.low_rank_dx()]


def peft_float32(l: Layer) -> Passes | None:
    """Under autocast: x becomes float32, goes through dropout so, and is cast back for the product with A; its gradient
    takes the same way."""
    if l.size == F32:
        return None
    wide = F32 // l.size
    forward = [
        l.base(), *cast("x", l.x, wide * l.x), *l.dropout(wide * l.x), *cast("D(x)", wide * l.x, l.x),
        *cast("A", wide * l.A, l.A), *cast("B", wide * l.B, l.B), *_low_rank(l),
    ]  # fmt: skip
    backward = [
        *_low_rank_backward(l), *cast("dA", l.A, wide * l.A), *cast("dB", l.B, wide * l.B),
        *cast("dx of D(x)", l.x, wide * l.x), *l.dropout_dx(wide * l.x), *cast("dx", wide * l.x, l.x), l.base_dx(),
    ]  # fmt: skip
    return Passes(forward, backward, parts_of_dx=2)


def peft_nf4(l: Layer) -> Passes | None:
    """W is dequantised for each of its products, and PEFT clones the base's y. Up to 1536 tokens bitsandbytes may take
    a kernel of its own in forward, which is not modelled."""
    if l.size == F32 or l.M <= 1536:
        return None
    weights, scales = l.N * l.K, l.N * l.K // 64  # a scale for 64 weights, itself of a byte
    dequantise = [
        elementwise("scales", scales, F32 * scales), elementwise("scales +", F32 * scales, F32 * scales),
        elementwise("W", weights // 2 + F32 * scales, l.size * weights),
    ]  # fmt: skip
    (base, *forward), (*backward, base_dx), _, parts_of_dx = eager(l)
    forward = [*dequantise, base, elementwise("clone y", l.y, l.y), *forward]
    return Passes(forward, [*backward, *dequantise, base_dx], parts_of_dx=parts_of_dx)


def unsloth(l: Layer) -> Passes | None:
    """S and dH are computed again wherever they are needed."""
    if l.p:
        return None
    backward = [l.dH(), l.dA(), l.shrink(), l.dB(), l.base_dx(), l.dH(), l.low_rank_dx(beta=1)]
    return Passes([l.base(), l.shrink(), l.expand(beta=1)], backward)


def axolotl_style(l: Layer) -> Passes:
    forward = [*l.dropout(l.x), l.base(), l.shrink(), l.expand(beta=1)]
    backward = [
        l.dH(), l.dA(), elementwise("dA · scaling", l.A, l.A), l.shrink(), l.dB(),
        elementwise("dB · scaling", l.B, l.B), l.base_dx(),
    ]  # fmt: skip
    if not l.p:
        return Passes(forward, [*backward, l.low_rank_dx(beta=1)])
    backward += [l.low_rank_dx(), elementwise("dH·A · scaling", l.x, l.x), *l.dropout_dx(l.x)]
    return Passes(forward, backward, parts_of_dx=2)


def lorafusion_style(l: Layer) -> Passes:
    forward = [*l.dropout(l.x), l.shrink(), elementwise("S · scaling", l.S, l.S), l.base(), l.expand(beta=1)]
    backward = [l.dH(), elementwise("dH · scaling", l.S, l.S), l.dB(), l.dA()]
    if not l.p:
        return Passes(forward, [*backward, l.base_dx(), l.low_rank_dx(beta=1)])
    masked = [elementwise("dH·A · mask", l.x + l.mask, l.x), elementwise("dH·A / (1 − p)", l.x, l.x)]
    return Passes(forward, [*backward, l.low_rank_dx(), *masked, l.base_dx(beta=1)])


# --- What could be done: measured by nobody here ----------------------------------------------------------------


def lorafusion(l: Layer) -> Passes:
    """LoRAFusion's own kernels, by its published code: dropout is a pass of its own, S·Bᵀ and D(dH·A) are computed
    inside the large products, dH and dB in one pass over dy. What its atomics cost is not counted."""
    dx = in_one(l.base_dx(), l.low_rank_dx(), kept=l.x)
    forward = [*l.dropout(l.x), l.shrink(), in_one(l.base(), l.expand(), kept=l.y)]
    return Passes(forward, [in_one(l.dH(), l.dB(), shared=l.y), l.dA(), _reads(dx, l.mask if l.p else 0)])


def ideal_passes(l: Layer) -> Passes:
    """A pass over x for S, which draws and writes a mask of a bit an element, one over dy, one over x for dA, and the
    rest inside the two large products. No partial sums go through memory."""
    bits, draws = (l.mask // 8, l.mask // 2) if l.p else (0, 0)  # 16 bits of randomness an element
    shrink = l.shrink()._replace(written=l.S + bits, draws=draws)
    dx = in_one(l.base_dx(), l.low_rank_dx(), kept=l.x)
    backward = [in_one(l.dH(), l.dB(), shared=l.y), _reads(l.dA(), bits), _reads(dx, bits)]
    return Passes([shrink, in_one(l.base(), l.expand(), kept=l.y)], backward)


def all_hidden(l: Layer) -> Passes:
    """Every pass runs behind the tensor cores: FLOPs alone."""
    forward, backward = (l.base(), l.shrink(), l.expand()), (l.base_dx(), l.low_rank_dx(), l.dH(), l.dA(), l.dB())
    return Passes(*([Launch("all", sum(one.flops for one in part))] for part in (forward, backward)))


def _reads(launch: Launch, more: int) -> Launch:
    return launch._replace(read=launch.read + more)


# --- Ours ----------------------------------------------------------------------------------------------------


def reference(layers: list[Layer], ceilings: Ceilings) -> Passes | None:
    """In plain PyTorch. With dropout it draws its masks by torch's integer products, of which there is no model."""
    if layers[0].p:
        return None
    forward, backward = [], []
    for j, l in enumerate(layers):
        forward += [l.shrink(), elementwise("S · scaling", l.S, l.S), l.expand(), l.base(beta=1)]
        backward += [l.dH(), elementwise("dH · scaling", l.S, l.S), l.low_rank_dx()]
        backward += [elementwise("dx +", 2 * l.x, l.x)] if j else []
        backward += [l.base_dx(beta=1), l.dA(), l.dB()]
    S = sum(l.S for l in layers)
    return Passes(forward + ([elementwise("cat of S", S, S)] if len(layers) > 1 else []), backward)


def triton(layers: list[Layer], ceilings: Ceilings, path: str, adapter: int = 0) -> Passes:
    """By `path` "fused" or "blas", with the untuned tiles.

    Args:
        adapter: bytes of an element of A and B, if not of x's dtype.
    """
    l, n, processors = layers[0], len(layers), int(ceilings.get("sms", 132))
    masks, wide = n if l.p else 1, (adapter or l.size) // l.size
    C, bits = n * l.R, masks * l.M * math.ceil(l.K / 8) if l.p else 0

    # Forward: one pass over x for S of all projections, then the large products.
    forward = [elementwise("seed", 0, INDEX)] if l.p else []
    forward += [elementwise("cat of the As", n * wide * l.A, n * wide * l.A)] if n > 1 else []
    tile = configs.shrink_tile(l.M, l.K, C // masks, l.size, l.p > 0, False)
    programs = masks * math.ceil(C // masks / tile.block_c) * math.ceil(l.M / tile.block_m)
    splits, _ = configs.split(l.K, tile.block_k, programs, processors)
    S = F32 * splits * l.M * C if splits > 1 else n * l.S
    draws = masks * l.mask // 2 if l.p else 0  # 16 bits an element
    forward.append(Launch("shrink", 2 * l.M * l.K * C, l.x + n * wide * l.A, S + bits, draws))
    forward += [elementwise("reduce S", S, n * l.S)] if splits > 1 else []
    for one in layers:
        if path == "fused":
            forward.append(in_one(one.base(), one.expand(), kept=one.y))
        else:
            forward += [*cast("B", wide * one.B, one.B), one.expand(), one.base(beta=1)]

    # Backward: one pass over each dy for dH and dB, one over x for every dA, then dx.
    backward = [launch for one in layers for launch in _dy_pass(one, wide, processors)]
    sums = [launch for launch in backward if launch.name == "dy pass"]
    if sums:
        partials = sum(one.written for one in sums)
        backward.append(elementwise("reduce dH and dB", partials, sum(one.S + wide * one.B for one in layers)))
    tile = configs.da_tile(l.M, l.K, C // masks, l.size, False)
    programs = math.ceil(l.K / tile.block_k) * masks * math.ceil(C // masks / tile.block_c)
    chunks, _ = configs.split(l.M, tile.block_m, programs, processors)
    dA = F32 * chunks * l.R * l.K
    backward.append(Launch("x pass", 2 * l.M * l.K * C, l.x + n * l.S + bits, n * dA))
    backward.append(elementwise("reduce dA", n * dA, n * wide * l.A))
    flops = sum(one.low_rank_dx().flops for one in layers)
    dx = Launch("Σ D(dH·A)", flops, n * (l.S + wide * l.A) + bits, l.x)
    if path == "fused":
        for one in layers:
            dx = in_one(one.base_dx(), dx, kept=l.x)
        return Passes(forward, [*backward, dx])
    if n == 1 and not l.p:
        dx = l.low_rank_dx()
        backward += cast("A", wide * l.A, l.A)
    return Passes(forward, [*backward, dx, *(one.base_dx(beta=1) for one in layers)])


def _dy_pass(l: Layer, wide: int, processors: int) -> list[Launch]:
    """dH and dB, in partial sums; by products of cuBLAS where these would be too large."""
    if configs.LARGEST_RANK_OF_DH_DB[l.size] < l.R:
        dB = F32 * l.N * l.R  # float32 whatever B is
        return [*cast("B", wide * l.B, l.B), l.dH(), l.dB()._replace(written=dB), *cast("dB", dB, wide * l.B)]
    tile = configs.dh_db_tile(l.M, l.N, l.R, l.size, False, 1)
    blocks = math.ceil(l.N / tile.block_n)
    chunks, _ = configs.split(l.M, tile.block_m, blocks, processors)
    dH, dB = F32 * blocks * l.M * l.R, F32 * chunks * l.N * l.R
    return [Launch("dy pass", 4 * l.M * l.N * l.R, l.y + wide * l.B + l.S, dH + dB)]


def cuda(layers: list[Layer], ceilings: Ceilings, path: str) -> Passes | None:
    """By the native kernels, as `cuda.py` calls them: 16-bit operands. The GEMM's partial sums of few tokens, and the
    launch that adds them, are left out. The pass over x is taken to fit beside the last tiles of dx.

    Args:
        path: "passes", or "fused" where one kernel computes S and y.
    """
    l, n, processors = layers[0], len(layers), int(ceilings.get("sms", 132))
    if l.size == F32:
        return None
    by_cublas = l.R > LARGEST_RANK_OF_PASS and not l.p
    masks = n if l.p else 1
    C, bits = n * l.R, l.M * math.ceil(l.K / 8) if l.p else 0
    forward = [elementwise("seed", 0, INDEX)] if l.p else []
    if by_cublas:
        forward += [one.shrink() for one in layers]
    else:
        forward += [elementwise("cat of the As", n * l.A, n * l.A)] if n > 1 else []
        S, draws = F32 * _shrink_parts(l.M, l.K, C, masks, processors) * l.M * C, masks * l.mask // 2
        shrink = Launch("shrink", 2 * l.M * l.K * C, l.x + n * l.A, S + masks * bits, draws if l.p else 0)
        forward += [shrink, elementwise("reduce S", S, n * l.S)]
    forward += [in_one(one.base(), one.expand(), kept=one.y) for one in layers]
    forward += [elementwise("cat of S", n * l.S, n * l.S)] if n > 1 else []
    if path == "fused" and n == 1 and not l.p and l.R <= LARGEST_RANK_OF_FORWARD:
        forward = [in_one(in_one(l.base(), l.shrink(), shared=l.x), l.expand(), shared=l.S, kept=l.y)]

    backward, partials = [], 0
    for one in layers:
        slices = math.ceil(one.N / 128)
        dB = F32 * native_parts(slices, one.M, processors) * one.N * one.R
        if l.R > LARGEST_RANK_OF_PASS:
            backward += [one.dH(), one.dB()._replace(written=F32 * one.N * one.R), *cast("dB", 2 * one.B, one.B)]
            continue
        if l.R > LARGEST_RANK_OF_JOINT_PASS:
            dH = F32 * _shrink_parts(one.M, one.N, one.R, 1, processors) * one.M * one.R
            backward += [one.dB()._replace(written=dB), one.dH()._replace(written=dH)]
        else:
            dH = F32 * slices * one.M * one.R
            backward.append(Launch("dy pass", 4 * one.M * one.N * one.R, one.y + one.B + one.S, dH + dB))
        partials += dH + dB
    if partials:
        backward.append(elementwise("reduce dH and dB", partials, sum(one.S + one.B for one in layers)))
    products = [in_one(one.base_dx(), one.low_rank_dx(), kept=one.x) for one in layers]
    dx = functools.reduce(lambda one, other: in_one(one, other, kept=l.x), products)
    dx = _reads(dx._replace(name="dx"), masks * bits)
    if by_cublas:
        dA = [l.dA()._replace(written=2 * l.A), *cast("dA", 2 * l.A, l.A)]
        return Passes(forward, [*backward, *n * dA, dx])
    backward += [elementwise("cat of dH", n * l.S, n * l.S)] if n > 1 else []
    streams = masks * math.ceil(C // masks / LARGEST_RANK_OF_PASS)
    dA = n * F32 * native_parts(streams * math.ceil(l.K / 128), l.M, processors) * l.R * l.K
    x_pass = Launch("x pass", 2 * l.M * l.K * C, l.x + n * l.S + masks * bits, dA)
    backward += [beside(dx, x_pass), elementwise("reduce dA", dA, n * l.A)]
    return Passes(forward, backward)


def _shrink_parts(M: int, depth: int, C: int, streams: int, processors: int) -> int:
    """Of `lora_shrink`: C columns, of as many streams."""
    width = C // streams
    columns = math.ceil(width / (16 if width <= 16 else 32 if width <= 32 else 64))
    return native_parts(math.ceil(M / 64) * streams * columns, depth, processors)


def accelerated(layers: list[Layer], ceilings: Ceilings, adapter: int = 0) -> Passes | None:
    """PEFT's layers, each with our op inside, by the path that nothing tuned takes: "blas" on a GPU, whose ceilings
    have its "sms"."""
    if adapter == layers[0].size:
        return None
    if "sms" in ceilings:
        return each(lambda l: triton([l], ceilings, "blas", adapter))(layers, ceilings)
    return None if adapter else each(lambda l: reference([l], ceilings))(layers, ceilings)


# --- By name -------------------------------------------------------------------------------------------------

#: None where the provider does not do that, or it cannot be said what it launches.
Model = Callable[[list[Layer], Ceilings], Passes | None]


def each(one: Callable[[Layer], Passes | None]) -> Model:
    """Of projections that know nothing of each other: autograd adds up their parts of dx."""

    def model(layers: list[Layer], ceilings: Ceilings) -> Passes | None:
        found = [passes for passes in map(one, layers) if passes]
        if len(found) < len(layers):
            return None
        x, parts = layers[0].x, sum(passes.parts_of_dx for passes in found)
        forward, backward = ([launch for passes in found for launch in passes[part]] for part in (0, 1))
        return Passes(forward, backward + [elementwise("dx +", 2 * x, x)] * (parts - 1))

    return model


PROVIDERS: dict[str, Model] = {
    BARE: each(bare),
    EAGER: each(eager),
    PEFT: each(eager),
    f"{PEFT} f32": each(peft_float32),
    f"{PEFT}, accelerated": accelerated,
    f"{PEFT} f32, accelerated": partial(accelerated, adapter=F32),
    "Unsloth": each(unsloth),
    "Axolotl-style": each(axolotl_style),
    "LoRAFusion-style": each(lorafusion_style),
    f"{PEFT}, NF4 base": each(peft_nf4),
    "ours, triton:fused": partial(triton, path="fused"),
    "ours, triton:blas": partial(triton, path="blas"),
    "ours, cuda:passes": partial(cuda, path="passes"),
    "ours, cuda:fused": partial(cuda, path="fused"),
    "ours, reference": reference,
}
#: Known from papers and by arithmetic only; no provider of the benchmark runs them.
DESIGNS: dict[str, Model] = {
    "LoRAFusion's kernels": each(lorafusion),
    "ideal passes, mask of bits": each(ideal_passes),
    "all passes hidden": each(all_hidden),
}
