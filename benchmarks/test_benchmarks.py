"""The registry through pytest-benchmark: `pytest benchmarks/`. Correctness is asserted, time is only reported."""

import pytest
import torch

from benchmarks.measure import check
from benchmarks.registry import OPS, make_inputs, providers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(shape, provider, id=f"{op}-{shape}-{provider.name}".replace(" ", "_"))
    for op, spec in OPS.items()
    for shape in spec.shapes(DEVICE)[:1]
    for provider in providers(shape, DEVICE)
]


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize(("shape", "provider"), CASES)
def test_provider(benchmark, shape, provider, direction):
    case = make_inputs(shape, DEVICE)
    assert check(provider, shape, case) is None
    call = getattr(provider.build(case), direction)

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
