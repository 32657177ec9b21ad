"""Every op and module as a function of all its operands, beside a plain expression of torch: the cases of
`tests/ops/test_transforms.py`, in float64."""

import torch
import torch.nn.functional as F
from torch.func import functional_call

import peft_kernels as pk

M, N, K, R = 3, 6, 8, 2
LAYOUTS = {
    "entries": pk.SparseLayout.from_indices((N, K), torch.tensor([1, 9, 30])),
    "rows": pk.SparseLayout.rows((N, K), torch.tensor([0, 3])),
    "columns": pk.SparseLayout.columns((N, K), torch.tensor([2, 5])),
    "blocks": pk.SparseLayout.blocks((N, K), (2, 4), torch.tensor([1, 3])),
    "n_of_m": pk.SparseLayout.n_of_m((torch.arange(K) % 4 == 0).expand(N, K), 1, 4),
}


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def with_slope(value, slope):
    """The numbers of one, the derivatives of both."""
    return value + slope - slope.detach()


class Case:
    """An op or a module as a function of all its operands, x first, and a plain expression of the same."""

    def __init__(self, ours, plain, operands):
        self.ours, self.plain, self.operands = ours, plain, operands


def lora_case(scaling=2.0):
    def ours(x, weight, lora_A, lora_B, bias):
        return pk.lora_linear(x, weight, lora_A, lora_B, scaling, bias)

    def plain(x, weight, lora_A, lora_B, bias):
        scale = scaling.unsqueeze(-1) if isinstance(scaling, torch.Tensor) else scaling
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, lora_A), lora_B)

    return Case(ours, plain, (numbers(M, K), numbers(N, K), numbers(R, K), numbers(N, R), numbers(N)))


def shared_case():
    one, other = lora_case(), lora_case(0.5)
    operands = (*one.operands, numbers(4, K), numbers(3, K), numbers(4, 3), numbers(4))

    def ours(x, *tensors):
        projections = [
            pk.Projection(weight, lora_A, lora_B, scaling, bias)
            for (weight, lora_A, lora_B, bias), scaling in ((tensors[:4], 2.0), (tensors[4:], 0.5))
        ]
        return torch.cat(pk.lora_linear_shared_input(x, projections), -1)

    def plain(x, *tensors):
        return torch.cat([one.plain(x, *tensors[:4]), other.plain(x, *tensors[4:])], -1)

    return Case(ours, plain, operands)


def sparse_case(kind):
    layout = LAYOUTS[kind]

    def ours(x, weight, values, bias):
        return pk.sparse_delta_linear(x, weight, values, layout, bias)

    def plain(x, weight, values, bias):
        return F.linear(x, weight.flatten().index_add(0, layout.indices(), values).view(N, K), bias)

    return Case(ours, plain, (numbers(M, K), numbers(N, K), numbers(layout.nnz), numbers(N)))


def gradient_case(kind):
    layout, held = LAYOUTS[kind], numbers(LAYOUTS[kind].nnz)

    def ours(x, weight, values):
        return pk.with_sparse_gradient_(F.linear(x, weight), x, values, layout)

    def plain(x, weight, values):
        return F.linear(x, weight.flatten().index_add(0, layout.indices(), values - held).view(N, K))

    return Case(ours, plain, (numbers(M, K), numbers(N, K), held))


def masked_case(tensor_threshold=False):
    threshold = torch.tensor(0.1, dtype=torch.float64) if tensor_threshold else 0.1

    def ours(x, weight, scores, bias):
        return pk.masked_linear(x, weight, scores, threshold, bias)

    def plain(x, weight, scores, bias):
        return F.linear(x, weight * with_slope((scores >= threshold).to(scores.dtype), scores), bias)

    return Case(ours, plain, (numbers(M, K), numbers(N, K), numbers(N, K), numbers(N)))


def scaled_case(scale_input=False):
    def ours(x, weight, scale, bias):
        return pk.scaled_linear(x, weight, scale, bias, scale_input=scale_input)

    def plain(x, weight, scale, bias):
        if scale_input:
            return F.linear(x * scale, weight, bias)
        z = F.linear(x, weight, bias)
        return (z * scale).to(z.dtype)

    return Case(ours, plain, (numbers(M, K), numbers(N, K), numbers(K if scale_input else N), numbers(N)))


def module_case(module, plain):
    names = list(dict(module.named_parameters()))

    def ours(x, *parameters):
        return functional_call(module, dict(zip(names, parameters)), (x,))

    def expected(x, *parameters):
        return plain(x, **{name.replace(".", "_"): value for name, value in zip(names, parameters)})

    return Case(ours, expected, (numbers(M, K), *(p.detach().clone() for p in module.parameters())))


def lora_module():
    layer = pk.nn.LoRALinear(K, N, R, lora_alpha=3.0, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def lora_module_case():
    def plain(x, weight, bias, lora_A, lora_B):
        return F.linear(x, weight, bias) + 1.5 * F.linear(F.linear(x, lora_A), lora_B)

    return module_case(lora_module(), plain)


def sparse_module(kind="entries"):
    layer = pk.nn.SparseDeltaLinear(K, N, LAYOUTS[kind], dtype=torch.float64)
    torch.nn.init.normal_(layer.values)
    layer.write(changed=True)
    return layer


def sparse_module_case(kind):
    layer = sparse_module(kind)
    layout, held = layer.layout, layer.values.detach().clone()

    def plain(x, weight, bias, deltas_default_values):
        changed = deltas_default_values - held
        return F.linear(x, weight.flatten().index_add(0, layout.indices(), changed).view(N, K), bias)

    return module_case(layer, plain)


CASES = {
    "lora_linear": lora_case,
    "a scaling a row": lambda: lora_case(torch.rand(M, dtype=torch.float64)),
    "lora_linear_shared_input": shared_case,
    **{f"sparse_delta_linear, {kind}": lambda kind=kind: sparse_case(kind) for kind in LAYOUTS},
    **{f"with_sparse_gradient_, {kind}": lambda kind=kind: gradient_case(kind) for kind in ("entries", "columns")},
    "masked_linear": masked_case,
    "a threshold that is a tensor": lambda: masked_case(True),
    "scaled_linear": scaled_case,
    "a scaled input": lambda: scaled_case(True),
    "LoRALinear": lora_module_case,
    **{f"SparseDeltaLinear, {kind}": lambda kind=kind: sparse_module_case(kind) for kind in ("entries", "rows")},
}
