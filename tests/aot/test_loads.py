"""How much is loaded at once where Triton by itself knows nothing of an address: PEFT's default rank, masks, odd
numbers of tokens, rows and columns. Read from the PTX that the launchers' own arguments compile to, for sm_90."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import peft_kernels as pk
from peft_kernels.ops.lora_linear import configs as lora_configs
from peft_kernels.ops.sparse_delta import configs as sparse_configs
from peft_kernels.testing.aot import compile_launch
from tests.aot.cases import cases
from tests.aot.lora_linear import Layer
from tests.aot.phantom import GPUS
from tests.aot.scenario import Scenario, backward
from tests.aot.sparse_delta import Call, layout

#: Loads of fewer than 4 bytes that a thread may have: of a bias, of columns' numbers.
FEW = 2


def loads(ptx: str) -> Counter[int]:
    """How many loads from global memory a thread has, by bytes."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", ptx)
    found = Counter(int(size, 0) for size in copies)
    for width, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[busf](\d+) ", ptx):
        found[int(width or 1) * int(bits) // 8] += 1
    return found


def test_loads_of_ptx():
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.b16 { %rs1 }, [ %rd2 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x8, %r6;
    """
    assert loads(ptx) == {16: 2, 2: 1, 8: 1}


def few_entries_of_odd_tokens(device: torch.device) -> None:
    """Sampled, as one value in a thousand trains."""
    x, weight = (torch.empty(rows, 4096, dtype=torch.bfloat16, device=device) for rows in (8191, 4096))
    place = layout("entries", 0.001, (4096, 4096)).to(device)
    values = torch.empty(place.nnz, device=device, requires_grad=True)
    backward(pk.sparse_delta_linear(x, weight, values, place))


def scenarios() -> Iterator[Scenario]:
    for layer, way in itertools.product((Layer(masks="own"), Layer(n=3, masks="own")), ("fused", "blas")):
        yield Scenario(f"{layer.name}-{way}", f"triton:{way}", layer.run, "bf16", True, "sm_90", lora_configs)
    for call in (Call("bf16", "rows", 41), Call("bf16", "columns", 41), Call("bf16", "blocks", (8, 16))):
        yield Scenario(call.name, "triton", call.run, "bf16", True, "sm_90", sparse_configs)
    yield Scenario("few", "triton", few_entries_of_odd_tokens, "bf16", True, "sm_90", sparse_configs)


#: Gathered or scattered by nature.
SCATTERED = ("write_kernel", "reduce_partials_kernel")


@pytest.mark.parametrize(
    "case", [pytest.param(one, id=one.name) for one in cases(GPUS[90], scenarios()) if one.launch.name not in SCATTERED]
)
def test_no_element_by_itself(case):
    compiled, _ = compile_launch(case.launch)
    found = loads(compiled.asm["ptx"])
    assert sum(count for size, count in found.items() if size < 4) <= FEW, found
