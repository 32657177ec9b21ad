import pytest
import torch

from peft_kernels.integrations.peft import ia3, lora, shared_input, shira


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The models are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def taken(monkeypatch) -> list:
    """Fills with what the accelerated layers ran: "alone", how many projections one op took, "sparse" or "scaled"."""
    calls = []
    alone, shared = lora.lora_linear, shared_input.lora_linear_shared_input
    sparse, scaled = shira.sparse_delta_linear, ia3.scaled_linear

    def spy_alone(*args, **kwargs):
        calls.append("alone")
        return alone(*args, **kwargs)

    def spy_shared(x, projections, **kwargs):
        calls.append(len(projections))
        return shared(x, projections, **kwargs)

    def spy_sparse(*args):
        calls.append("sparse")
        return sparse(*args)

    def spy_scaled(*args, **kwargs):
        calls.append("scaled")
        return scaled(*args, **kwargs)

    monkeypatch.setattr(lora, "lora_linear", spy_alone)
    monkeypatch.setattr(shared_input, "lora_linear_shared_input", spy_shared)
    monkeypatch.setattr(shira, "sparse_delta_linear", spy_sparse)
    monkeypatch.setattr(ia3, "scaled_linear", spy_scaled)
    return calls
