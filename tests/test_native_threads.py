"""Native kernels as the first thing of a thread: a fresh one has no context of CUDA, without which the driver makes no
tensor map. Each in a process of its own, whose threads nothing has run on. csrc/selftest/fresh_thread.cu is the same
without a GPU."""

import subprocess
import sys

import pytest

from peft_kernels import _native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _native.load(cuda=True), reason=_native.why_not(cuda=True)),
]

#: A layer that takes the forward as one kernel where the GPU has it, and dx by tensor maps.
LAYER = """
import threading
import torch, peft_kernels as pk
make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
x, weight, lora_A, lora_B, dy = make(512, 1024), make(2048, 1024), make(16, 1024), make(2048, 16), make(512, 2048)
def forward(x, *adapter):
    with pk.use_backend("cuda:fused" if torch.cuda.get_device_capability() == (9, 0) else "cuda"):
        return pk.lora_linear(x, weight, *(adapter or (lora_A, lora_B)), 2.0)
"""

FORWARD = f"""{LAYER}
expected = forward(x).cpu()  # the allocator now has the memory: to ask for more would bind a context
found = []
thread = threading.Thread(target=lambda: found.append(forward(x)))
thread.start(), thread.join()
assert torch.equal(found[0].cpu(), expected)
"""

#: The frozen layer's dx is the first node of the backward, on autograd's own thread.
DX = f"""{LAYER}
leaf = x.clone().requires_grad_()
forward(leaf).backward(dy)
expected = dy.float() @ (weight.float() + 2.0 * lora_B.float() @ lora_A.float())
assert (leaf.grad.float() - expected).abs().max() <= 0.02 * expected.abs().max()
"""

N_OF_M = """
import torch, peft_kernels as pk
from peft_kernels.testing.sparse_delta import make_layout
layout = make_layout("n_of_m", 1536, 1024, 0.5).to("cuda")
make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
x, weight, dy = make(512, 1024), make(1536, 1024), make(512, 1536)
values = torch.zeros(layout.nnz, device="cuda", requires_grad=True)
with pk.use_backend("cuda"):
    pk.sparse_delta_linear(x, weight, values, layout).backward(dy)
expected = layout.take(dy.float().t() @ x.float())
assert (values.grad - expected).abs().max() <= 0.02 * expected.abs().max()
"""


@pytest.mark.parametrize("code", [FORWARD, DX, N_OF_M], ids=["forward", "dx", "n_of_m"])
def test_first_in_a_thread(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
