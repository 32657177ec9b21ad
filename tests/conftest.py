"""Tests marked `gpu` are skipped, and shown as skipped, where there is no CUDA GPU."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    # Kernels run in tests/interpret and are compiled in tests/aot as well; CUDA's streams and memory have no stand-in.
    skip = pytest.mark.skip(reason="needs a CUDA GPU")  # no GPU here: a launch would fail before anything is tested
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
