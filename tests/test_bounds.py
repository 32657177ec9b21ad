"""The error rule where a GPU's kernels sum in another order than cuBLAS: bounds that follow from how they sum hold for
such sums, and catch operands of fewer bits."""

import pytest
import torch

from peft_kernels.testing import assert_within_eager
from peft_kernels.testing.bounds import Sums
from peft_kernels.testing.lora_linear import make_case, sums

OUTPUTS = 2000


def products(terms, bits=None):
    """Random float32 operands' products in float64 [terms, OUTPUTS]; operands of fewer bits if asked."""
    generator = torch.Generator().manual_seed(terms)
    pair = [torch.randn(terms, OUTPUTS, generator=generator).double() for _ in range(2)]
    return torch.stack([operand if bits is None else rounded(operand, bits) for operand in pair]).prod(0)


def rounded(values, bits, cut=False):
    """To so many bits; towards zero if `cut`."""
    mantissa, exponent = torch.frexp(values)
    scaled = mantissa * 2**bits
    return torch.ldexp((scaled.trunc() if cut else scaled.round()) / 2**bits, exponent)


def one_after_the_other(terms, splits=1):
    parts = [part.float() for part in products(terms).chunk(splits)]
    total = torch.zeros(OUTPUTS)
    for part in parts:
        partial = torch.zeros(OUTPUTS)
        for term in part:  # a product is rounded here, which FMA would not: 1/√terms of the error
            partial = partial + term
        total = total + partial
    return total


def on_tensor_cores(terms):
    """Six passes over groups of eight, as if each piece were a sixth of its product; cut to 24 bits at each."""
    partial = torch.zeros(OUTPUTS, dtype=torch.float64)
    for group in products(terms).split(8):
        for _ in range(6):
            partial = rounded(partial + group.sum(0) / 6, 24, cut=True)
    return partial.float()


def check(actual, yardstick, terms, **which):
    assert_within_eager("y", actual, yardstick, products(terms).sum(0), sums=(which and Sums(terms, **which)) or None)


@pytest.mark.parametrize("terms", [64, 1024, 4096])
class TestSums:
    def test_one_after_the_other(self, terms):
        """Right, and further off than what is split; the bound is not far above it."""
        found, exact = one_after_the_other(terms), products(terms).sum(0)
        check(found, one_after_the_other(terms, 16), terms, tensor_cores=False)
        error = (found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 0.5 < error / Sums(terms).error < 1.25
        if terms > 64:
            with pytest.raises(AssertionError, match="error"):
                check(found, one_after_the_other(terms, 16), terms)

    def test_on_tensor_cores(self, terms):
        found, exact = on_tensor_cores(terms), products(terms).sum(0)
        check(found, one_after_the_other(terms, 16), terms, tensor_cores=True)
        error = (found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 0.3 < error / Sums(terms, tensor_cores=True).error < 1.25

    @pytest.mark.parametrize(("bits", "tensor_cores"), [(11, False), (8, True)], ids=["tf32", "bfloat16"])
    def test_operands_of_fewer_bits_are_caught(self, terms, bits, tensor_cores):
        found = products(terms, bits).sum(0).float()
        with pytest.raises(AssertionError, match="error"):
            check(found, one_after_the_other(terms, 16), terms, tensor_cores=tensor_cores)


def test_where_they_hold(monkeypatch):
    """On a GPU, of float32 products; in the interpreter, of float32 adapters beside 16 bits; nowhere else."""
    sizes = {"batch": (7,), "in_features": 24, "out_features": (16, 8), "rank": 4}
    assert sums(make_case(**sizes), "triton") == {}
    beside = make_case(**sizes, dtype=torch.float16, adapter_dtype=torch.float32, adapter_precision="high")
    assert sums(beside, "reference") == {} and sums(beside, "triton")["grad of lora_A0"] == Sums(23)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    assert sums(make_case(**sizes), "triton") == {
        "y0": Sums(28), "y1": Sums(28), "grad of x": Sums(32), "grad of lora_A0": Sums(23), "grad of lora_A1": Sums(15),
        "grad of lora_B0": Sums(31), "grad of lora_B1": Sums(31), "grad of weight0": Sums(7),
        "grad of weight1": Sums(7), "grad of bias0": Sums(7), "grad of bias1": Sums(7),
    }  # fmt: skip
    halves = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    assert sums(make_case(**sizes, **halves), "triton") == {}
    high = sums(make_case(**sizes, **halves, adapter_precision="high"), "triton")
    assert high == {name: Sums(n, True) for name, n in (
        ("grad of lora_A0", 23), ("grad of lora_B0", 31), ("grad of lora_A1", 15), ("grad of lora_B1", 31),
    )}  # fmt: skip
