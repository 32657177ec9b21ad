"""What is measured: one OpSpec an op, with its shapes, FLOPs, bytes, inputs and providers.

Counting rules. FLOPs: two a multiply-add of every product that the mathematics needs. Bytes: each input read once,
each output written once, what is saved written once and read once. The floor of a shape is the larger of FLOPs over
the machine's measured matmul rate and bytes over its measured copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels import backends
from peft_kernels.testing.lora_linear import LoRACase

REFERENCE_SHAPE = (8192, 4096, (4096,), 16)


@dataclass(frozen=True)
class Shape:
    """M tokens, K in_features, out_features of each projection, rank R, dtype of base and adapters, dropout."""

    M: int
    K: int
    Ns: tuple[int, ...]
    R: int
    dtype: torch.dtype
    p: float = 0.0

    def __str__(self) -> str:
        features = "+".join(map(str, self.Ns))
        dtype = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        return f"M={self.M} {self.K}→{features} R={self.R} {dtype} p={self.p:g}"


def flops(shape: Shape, backward: bool) -> int:
    """Of the forward, or of forward and backward with lora_A, lora_B and x taking gradients."""
    M, K, R = shape.M, shape.K, shape.R
    total = 0
    for N in shape.Ns:
        total += 2 * M * N * K + 2 * M * K * R + 2 * M * R * N
        if backward:  # dx: dy·W and dH·A; dH; dA; dB
            total += 2 * M * N * K + 2 * M * R * K + 2 * M * N * R + 2 * M * R * K + 2 * M * N * R
    return total


def bytes_moved(shape: Shape, backward: bool) -> int:
    """The fewest: x once for all projections in forward, and once in backward; one dx."""
    M, K, R, size = shape.M, shape.K, shape.R, shape.dtype.itemsize
    weights = sum(N * K + R * K + N * R for N in shape.Ns) * size
    outputs = sum(M * N for N in shape.Ns) * size
    total = M * K * size + weights + outputs
    if backward:
        saved = len(shape.Ns) * (M * R * size + (M * ((K + 7) // 8) if shape.p else 0))
        adapters = sum(R * K + N * R for N in shape.Ns) * size
        total += 2 * saved + outputs + M * K * size + weights + M * K * size + adapters
    return total


def base_flops(shape: Shape, backward: bool) -> int:
    return sum(2 * shape.M * N * shape.K for N in shape.Ns) * (2 if backward else 1)


def launches_and_bytes(shape: Shape) -> dict[str, dict[str, int]]:
    """Forward and backward of the Triton kernels for projections that share x, together and one by one: launches,
    bytes of passes over x and dx (the GEMMs' own reads of x included), and sums of dx by autograd.

    Together: one shrink, an expand each; a pass over each dy with two reductions each, one pass over x with a
    reduction each, one GEMM for dx. One by one, all of these each, and n − 1 additions of dx, which read two
    tensors and write one.
    """
    n, pass_over_x = len(shape.Ns), shape.M * shape.K * shape.dtype.itemsize
    together = {
        "launches": 1 + n + 3 * n + (1 + n) + 1,
        "passes over x and dx (bytes)": (1 + n + 1 + 1) * pass_over_x,
        "sums of dx": 0,
    }
    separate = {
        "launches": n * (1 + 1 + 3 + 2 + 1) + (n - 1),
        "passes over x and dx (bytes)": (n * (1 + 1 + 1 + 1) + 3 * (n - 1)) * pass_over_x,
        "sums of dx": n - 1,
    }
    return {"together": together, "one by one": separate}


def make_inputs(shape: Shape, device: str, seed: int = 0) -> LoRACase:
    """Random operands of order one, B ≠ 0; never zeros, which hide errors and run faster."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return values.mul_(scale).to(shape.dtype)

    projections = [
        pk.Projection(
            random(N, shape.K, scale=shape.K**-0.5), random(shape.R, shape.K, scale=shape.K**-0.5),
            random(N, shape.R, scale=0.5 * shape.R**-0.5), 2.0, None,
        )
        for N in shape.Ns
    ]  # fmt: skip
    return LoRACase(
        random(shape.M, shape.K), projections, [random(shape.M, N) for N in shape.Ns], shape.p,
        frozen=("weight", "bias"), seed=seed,
    )  # fmt: skip


# --- Providers -----------------------------------------------------------------------------------------------


@dataclass
class Ready:
    """A provider on one case: `forward()` gives the ys; `leaves` take gradients, in the order x, then A, B each."""

    forward: Callable[[], tuple[torch.Tensor, ...]]
    leaves: list[torch.Tensor]
    grad_ys: list[torch.Tensor]

    def forward_backward(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.grad_ys)


@dataclass(frozen=True)
class Provider:
    """`build(case)` makes it ready to run; `adapters` says whether it computes the low-rank part at all."""

    name: str
    build: Callable[[LoRACase], Ready]
    adapters: bool = True
    ours: bool = False


def _leaves(case: LoRACase, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, list[pk.Projection]]:
    x = case.x.clone().requires_grad_()
    return x, [
        p._replace(
            lora_A=p.lora_A.to(dtype or p.lora_A.dtype, copy=True).requires_grad_(),
            lora_B=p.lora_B.to(dtype or p.lora_B.dtype, copy=True).requires_grad_(),
        )
        for p in case.projections
    ]


def _flat(x: torch.Tensor, projections: list[pk.Projection]) -> list[torch.Tensor]:
    return [x] + [leaf for p in projections for leaf in (p.lora_A, p.lora_B)]


def linear(case: LoRACase) -> Ready:
    x = case.x.clone().requires_grad_()
    weights = [p.weight for p in case.projections]
    return Ready(lambda: tuple(F.linear(x, weight) for weight in weights), [x], case.grad_ys)


def _expression(x, weights, lora_As, lora_Bs, scalings, p):
    return tuple(
        F.linear(x, weight) + F.linear(F.linear(F.dropout(x, p), lora_A), lora_B) * scaling
        for weight, lora_A, lora_B, scaling in zip(weights, lora_As, lora_Bs, scalings)
    )


def _eager(case: LoRACase, expression: Callable) -> Ready:
    x, projections = _leaves(case)
    weights, lora_As, lora_Bs, scalings, _ = (list(column) for column in zip(*projections))
    return Ready(
        lambda: expression(x, weights, lora_As, lora_Bs, scalings, case.dropout_p), _flat(x, projections), case.grad_ys
    )


def eager(case: LoRACase) -> Ready:
    return _eager(case, _expression)


def compiled(case: LoRACase) -> Ready:
    torch._dynamo.reset()
    return _eager(case, torch.compile(_expression, dynamic=False))


def peft_layers(case: LoRACase, adapter_dtype: torch.dtype) -> torch.nn.ModuleList:
    """Hugging Face PEFT's own layers around the case's weights and adapters."""
    from peft import LoraConfig, get_peft_model

    modules = torch.nn.Module()
    for j, p in enumerate(case.projections):
        N, K = p.weight.shape
        layer = torch.nn.Linear(K, N, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(p.weight, requires_grad=False)
        modules.add_module(f"proj{j}", layer)
    config = LoraConfig(
        r=case.projections[0].lora_A.shape[0], lora_alpha=2 * case.projections[0].lora_A.shape[0],
        lora_dropout=case.dropout_p, target_modules=[f"proj{j}" for j in range(len(case.projections))],
    )  # fmt: skip
    model = get_peft_model(modules, config, autocast_adapter_dtype=False).base_model.model
    layers = [getattr(model, f"proj{j}") for j in range(len(case.projections))]
    for layer, p in zip(layers, case.projections):
        for module, value in ((layer.lora_A["default"], p.lora_A), (layer.lora_B["default"], p.lora_B)):
            module.weight = torch.nn.Parameter(value.to(adapter_dtype, copy=True))
    return torch.nn.ModuleList(layers)


def _layers(case: LoRACase, layers: torch.nn.ModuleList) -> Ready:
    x = case.x.clone().requires_grad_()
    leaves = [x] + [w for layer in layers for w in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
    return Ready(lambda: tuple(layer(x) for layer in layers), leaves, case.grad_ys)


def peft(case: LoRACase) -> Ready:
    return _layers(case, peft_layers(case, case.x.dtype))


def peft_float32_adapters(case: LoRACase) -> Ready:
    """PEFT's default: float32 adapters beside a 16-bit base, trained under autocast."""
    built = _layers(case, peft_layers(case, torch.float32))
    inner = built.forward

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.autocast(case.x.device.type, dtype=case.x.dtype):
            return inner()

    return replace(built, forward=forward)


def ours(case: LoRACase, backend: str) -> Ready:
    x, projections = _leaves(case)
    dropout = dict(dropout_p=case.dropout_p, training=True)

    def forward() -> tuple[torch.Tensor, ...]:
        if len(projections) == 1:
            return (pk.lora_linear(x, *projections[0], **dropout),)
        return pk.lora_linear_shared_input(x, projections, **dropout)

    def forced() -> tuple[torch.Tensor, ...]:
        with pk.use_backend(backend):
            return forward()

    chosen = backends.choose("lora_linear", x) == backend  # then nothing needs forcing, which costs the host time
    return Ready(forward if chosen else forced, _flat(x, projections), case.grad_ys)


def providers(shape: Shape, device: str) -> Iterator[Provider]:
    """What can run here, the bare linear first."""
    yield Provider("nn.Linear", linear, adapters=False)
    yield Provider("eager", eager)
    yield Provider("PEFT", peft)
    if shape.dtype.itemsize == 2:
        yield Provider("PEFT, f32 adapters", peft_float32_adapters)
    yield Provider("torch.compile", compiled)
    for backend in ("triton:fused", "triton:blas") if device == "cuda" else ("reference",):
        yield Provider(f"ours, {backend}", lambda case, backend=backend: ours(case, backend), ours=True)


# --- Shapes --------------------------------------------------------------------------------------------------


def _cpu_shapes(Ns_of: Callable[[int, int], tuple[int, ...]], features: list[tuple[int, int]]) -> list[Shape]:
    shapes = []
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, 0.1):
            shapes += [Shape(512, K, Ns_of(K, N), 16, dtype, p) for K, N in features]
        K, N = features[0]
        shapes += [Shape(M, K, Ns_of(K, N), 16, dtype) for M in (1, 8, 64, 1024)]
    return shapes


def _gpu_shapes(widths: list[tuple[int, tuple[int, ...]]]) -> list[Shape]:
    """The reference shape first, then the bars' grid: what matters most is measured if time runs out."""
    bf16 = torch.bfloat16
    shapes = [Shape(8192, K, Ns, 16, bf16, p) for K, Ns in widths for p in (0.0, 0.1)]
    K, Ns = widths[0]
    shapes += [Shape(M, K, Ns, 16, bf16) for M in (1, 16, 64, 256, 1024, 2048, 4096, 16384)]
    shapes += [Shape(8192, K, Ns, R, bf16) for R in (8, 32, 64, 128, 512)]
    shapes += [Shape(8192, K, Ns, 16, torch.float16, p) for p in (0.0, 0.1)]
    return shapes


def lora_linear_shapes(device: str) -> list[Shape]:
    if device == "cpu":
        smollm2 = [(576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048)]
        return _cpu_shapes(lambda K, N: (N,), smollm2)
    llama = [(4096, (4096,)), (4096, (1024,)), (4096, (14336,)), (14336, (4096,))]
    lorafusion = [
        Shape(256 * m, width, (width,), 16, torch.bfloat16, 0.1)
        for width in (4096, 5120, 8192)
        for m in (8, 16, 24, 32)
    ]
    return _gpu_shapes(llama) + [shape for shape in lorafusion if shape.M != 8192 or shape.K != 4096]


def shared_input_shapes(device: str) -> list[Shape]:
    if device == "cpu":
        return [
            Shape(512, 576, Ns, 16, dtype, p)
            for Ns in ((576, 192, 192), (1536, 1536))
            for dtype in (torch.float32, torch.bfloat16)
            for p in (0.0, 0.1)
        ]
    return _gpu_shapes([(4096, (4096, 1024, 1024)), (4096, (14336, 14336))])


@dataclass(frozen=True)
class OpSpec:
    name: str
    shapes: Callable[[str], list[Shape]]


OPS = {
    spec.name: spec
    for spec in (
        OpSpec("lora_linear", lora_linear_shapes),
        OpSpec("lora_linear_shared_input", shared_input_shapes),
    )
}
