"""The registry through pytest-benchmark: `pytest benchmarks/ --benchmark-only`, and `--benchmark-compare` between runs.

The first case of each LoRA op, by every provider. Correctness is asserted, time is only reported."""

import pytest
import torch

from benchmarks.lora import check, make_inputs
from benchmarks.providers import all_providers
from benchmarks.specs import SPECS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(SPECS[op].cases(DEVICE)[0], provider, id=f"{op}-{provider.name}".replace(" ", "_"))
    for op in ("lora_linear", "lora_linear_shared_input")
    for provider in all_providers(DEVICE)
]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(("shape", "provider"), CASES)
def test_provider(benchmark, shape, provider, direction):
    if provider.why_not or (provider.sixteen_bits and shape.dtype.itemsize != 2):
        pytest.skip(provider.why_not or "for a 16-bit base")
    assert check(provider, shape, DEVICE) is None
    call = getattr(provider.build(make_inputs(shape, DEVICE)), direction)

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
