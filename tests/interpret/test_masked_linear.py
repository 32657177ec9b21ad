"""The Triton kernels of the masked linear op in Triton's interpreter: what is special to them."""

import os

import pytest
import torch

from tests.checks import masked_linear as checks
from tests.checks.contract import MASKED, check_within_eager

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
)


def test_several_groups_of_tiles():
    """More rows of tiles than a group has, in both kernels."""
    check_within_eager(MASKED, "triton", batch=(530,), in_features=24, out_features=530)


def test_mask():
    checks.check_mask("triton", dtypes=(torch.float32, torch.float16))


def test_float32_scores_keep_their_mask():
    checks.check_float32_scores_beside("triton", torch.float16)
