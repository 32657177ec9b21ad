"""docs/kernels.md lists the kernels that there are. Not their numbers, which each compiler has its own of: `make
resources` writes the page."""

from __future__ import annotations

import re

import pytest

from peft_kernels import _native
from tests.aot import native, table


def sections() -> dict[str, str]:
    text = table.PAGE.read_text()
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))


def test_it_lists_what_is_launched():
    written = sections()
    expected = {(case.launch.name, table.blocks(case.launch)) for case in table.to_show()}
    missing = [(kernel, blocks) for kernel, blocks in expected if f"| {blocks} |" not in written.get(kernel, "")]
    assert not missing
    assert {kernel for kernel in written if kernel.endswith("_kernel")} == {kernel for kernel, _ in expected}


@pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")
def test_it_lists_the_native_kernels():
    names = {one.name for architecture in ("sm_80", "sm_90a") for one in native.kernels(architecture)}
    written = sections()
    listed = {
        name
        for architecture in ("sm_80", "sm_90a")
        for name in re.findall(r"^\| `(.*?)` \|", written[f"The native library on {architecture}"], re.MULTILINE)
    }
    assert listed == names
