"""What launchers pass to Triton, as its JIT specialises it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from triton import knobs
from triton.backends.driver import DriverBase
from triton.runtime import driver

from peft_kernels.testing.aot import Launch
from tests.aot.phantom import Gpu, present


class _Driver(DriverBase):
    """Answers what the JIT asks before it compiles. Nothing is ever launched by it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self):
        return self._gpu.target

    def get_current_device(self) -> int:
        return self._gpu.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def _not_asked(self, *_):
        raise NotImplementedError("expected a launch to end where it would be compiled")

    map_python_to_cpp_type = get_active_torch_device = get_benchmarker = _not_asked


@contextlib.contextmanager
def recording(gpu: Gpu) -> Iterator[list[Launch]]:
    """Inside the block launches on this GPU are not compiled and not run; the list holds them, in order.

    Triton decides of each what it would compile: types, which integers are 1, which of them and which addresses are
    divisible by 16, what is None.
    """
    launches: list[Launch] = []

    def take(*, fn, compile, **_) -> bool:
        (attributes,) = compile["configs"]
        launches.append(
            Launch(
                fn.jit_function, compile["signature"], compile["constants"], attributes, compile["num_warps"],
                compile["num_stages"], gpu.target,
            )
        )  # fmt: skip
        return True  # leave it at that

    with present(gpu), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = take
        driver.set_active(_Driver(gpu))
        try:
            yield launches
        finally:
            driver.set_active(None)  # whichever is there is found again when it is asked for
