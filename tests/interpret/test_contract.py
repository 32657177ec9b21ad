"""The Triton kernels of every op with one x and one y in Triton's interpreter. It multiplies float16 and float32
rightly, and bfloat16 not at all, so that bfloat16 is left to the GPU suite."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks import contract as checks
from tests.checks.contract import CONTRACTS, SETTINGS, SHAPES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
)
PRECISIONS = ["float16", "float32", "float32-operand"]
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_setting = pytest.mark.parametrize(("op", "setting"), SETTINGS)


def arguments_of(op, setting, precision):
    contract = CONTRACTS[op]
    return contract.settings[setting] | contract.dtypes(torch.float16, torch.float32)[precision]


# A bias is added where all else is done: it is left away at one shape.
CASES = [(*one, shape) for one in SETTINGS for shape in SHAPES if "bias" not in one[1] or shape == "odd"]


@every_precision
@pytest.mark.parametrize(("op", "setting", "shape"), CASES)
def test_within_eager(op, setting, shape, precision):
    arguments = SHAPES[shape] | arguments_of(op, setting, precision)
    checks.check_within_eager(CONTRACTS[op], "triton", **arguments)


@pytest.mark.parametrize("op", CONTRACTS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes(op, data):
    arguments = {
        "batch": (data.draw(st.integers(1, 300)),),
        "in_features": data.draw(st.integers(8, 150)),
        "out_features": data.draw(st.integers(8, 300)),
        **{name: data.draw(strategy) for name, strategy in CONTRACTS[op].drawn.items()},
    }
    checks.check_within_eager(CONTRACTS[op], "triton", **arguments)


@every_precision
@every_setting
def test_subsets(op, setting, precision):
    checks.check_subsets(CONTRACTS[op], "triton", **arguments_of(op, setting, precision))


@pytest.mark.parametrize("op", CONTRACTS)
def test_runs(op, monkeypatch):
    checks.check_runs(CONTRACTS[op], "triton", "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", CONTRACTS)
def test_layouts(op, dtype):
    checks.check_layouts(CONTRACTS[op], "triton", dtype=dtype)
