"""What `python -m peft_kernels tune` launches, in Triton's interpreter: every candidate of every job's kind, held
against float64 as on a GPU, at shapes that the interpreter can afford."""

import os

import pytest
import torch

from peft_kernels import _native
from peft_kernels.ops.lora_linear import cuda
from peft_kernels.tune.jobs import PACKAGES, Job
from peft_kernels.tune.measure import check, problem
from tests.checks.native import (
    lora_forward,
    lora_gemm,
    lora_grads,
    lora_outer,
    lora_shrink,
    reduce_partials,
    standing_in,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
)
KEYS = [
    ("lora_linear", "shrink_tile", (40, 72, 16, 2, False, False)),
    ("lora_linear", "shrink_tile", (40, 72, 32, 2, True, False)),
    ("lora_linear", "dh_db_tile", (40, 72, 16, 2, False)),
    ("lora_linear", "da_tile", (40, 72, 32, 2, False)),
    ("lora_linear", "gemm_tile", (40, 72, 16, 2, False, 0, False, True)),
    ("lora_linear", "gemm_tile", (40, 72, 16, 2, False, 1, False, True)),
    ("lora_linear", "gemm_tile", (40, 72, 32, 2, False, 1, False, False)),
    ("masked_linear", "gemm_tile", (40, 72, 2, True)),
    ("masked_linear", "grad_tile", (40, 72, 2, True)),
    ("sparse_delta", "sampled_tile", (2,)),
    ("sparse_delta", "thin_tile", (16, 256, 2)),
    ("sparse_delta", "thin_tile", (256, 16, 2)),
    ("sparse_delta", "thin_tile", (16, 32, 2)),
    ("sparse_delta", "grad_tile", (40, 72, 4, 2)),
]


@pytest.mark.parametrize(("op", "choice", "key"), KEYS)
def test_every_candidate_passes_the_check(op, choice, key):
    candidates = tuple(PACKAGES[op].CHOICES[choice].candidates(*key, 0))
    assert len(candidates) > 1
    prepared = problem(Job(op, choice, key, (), candidates), {}, "cpu", torch.float16, K=96)
    assert check(prepared, candidates) == [""] * len(candidates)


@pytest.mark.parametrize(
    ("op", "choice", "at"), [("lora_linear", "fused_from", (40, 72, 48)), ("sparse_delta", "sampled_up_to", (0.02,))]
)
def test_both_paths_pass_the_check(op, choice, at):
    paths = PACKAGES[op].CHOICES[choice].crossover.paths
    prepared = problem(Job(op, choice, (2,), at, paths), {}, "cpu", torch.float16, K=96)
    assert check(prepared, paths) == ["", ""]


@pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")
@pytest.mark.parametrize("choice", ["cuda_fused_from", "cuda_from"])
@pytest.mark.parametrize("table", [{}, {("fused_from", 2): 0, ("cuda_fused_from", 2): 0}], ids=["untuned", "tuned"])
def test_native_kernels_pass_the_check(choice, table, monkeypatch):
    monkeypatch.setattr(cuda, "has_boxes", lambda _: True)  # whose kernels the stand-ins are
    paths = PACKAGES["lora_linear"].CHOICES[choice].crossover.paths
    with standing_in(lora_forward, lora_gemm, lora_grads, lora_outer, lora_shrink, reduce_partials):
        prepared = problem(Job("lora_linear", choice, (2,), (40, 72, 48), paths), table, "cpu", torch.float16)
        assert check(prepared, paths) == ["", ""]
