"""The masked linear op on the CPU: what is special to it. What every op with one x and one y is held to is in
`test_contract.py`."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import peft_kernels as pk
from peft_kernels.ops.masked_linear import configs, reference
from peft_kernels.testing.masked_linear import float64_reference, make_case, run
from tests.checks import masked_linear as checks
from tests.checks.contract import MASKED, check_within_eager

DTYPES = MASKED.dtypes(torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_eager_in_bands(dtype, monkeypatch):
    """A weight of many bands, the last of another size, and none of the masked copies larger than a band."""
    monkeypatch.setattr(reference, "_BAND_BYTES", 3000)
    largest, mask = [], reference.mask

    def spy(values, scores, tau):
        largest.append(values.numel() * values.element_size())
        return mask(values, scores, tau)

    monkeypatch.setattr(reference, "mask", spy)
    check_within_eager(MASKED, "reference", batch=(50,), in_features=71, out_features=53, **DTYPES[dtype])
    assert 1000 < max(largest) <= 3000


def test_float32_scores_beside_float64():
    case = make_case((3, 5), 20, 12, torch.float64, torch.float32)
    exact = float64_reference(case)
    for name, value in run(case).items():
        torch.testing.assert_close(value, exact[name].to(value.dtype))
        assert value.dtype == (torch.float32 if name == "grad of scores" else torch.float64)


def test_mask():
    checks.check_mask("reference", dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16))


def test_float32_scores_keep_their_mask():
    checks.check_float32_scores_beside("reference", torch.bfloat16)


def test_autocast_keeps_the_mask_of_float32_scores():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checks.check_float32_scores_beside("reference", torch.float32)


def test_a_score_of_another_mask_gets_its_gradient():
    """The gradient is straight-through: a score below the threshold is told what its weight would do."""
    case = replace(make_case(), threshold=100.0)
    results = run(case)
    assert not results["grad of weight"].any()
    expected = (case.grad_y.t() @ case.x) * case.weight
    torch.testing.assert_close(results["grad of scores"], expected)


def test_a_threshold_that_is_a_tensor_recompiles_nothing():
    torch._dynamo.reset()
    graphs = CompileCounter()
    case = make_case()
    compiled = torch.compile(pk.masked_linear, fullgraph=True, backend=graphs)
    for value in (-0.25, 0.0, 1.0):
        y = compiled(case.x, case.weight, case.scores, torch.tensor(value))
        torch.testing.assert_close(y, pk.masked_linear(case.x, case.weight, case.scores, value))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiles(arch, element_size, aligned):
    """Powers of two that tl.dot takes, and accumulators of at most 128 values a thread."""
    for M in (1, 64, 65, 513, 8192):
        for N in (1, 512, 4096, 128256):
            for choose in (configs.gemm_tile, configs.grad_tile):
                tile = choose(M, N, element_size, arch, aligned)
                sizes = tile.block_m, tile.block_n, tile.block_k
                assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
                assert tile.block_m * tile.block_n <= 128 * 32 * tile.num_warps
