import pytest
import torch


@pytest.fixture(autouse=True)
def exact_float32(request, monkeypatch):
    """Eager float32 on a GPU without tf32, as the kernels follow torch's own setting."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
