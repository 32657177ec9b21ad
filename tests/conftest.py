"""Tests marked `gpu` are skipped, and shown as skipped, where there is no CUDA GPU."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")  # these launch kernels; elsewhere the interpreter runs them
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
