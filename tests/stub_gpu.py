"""A machine that looks as if it had a GPU, for `tests/test_gpu_run.py`: as a pytest plugin (`-p tests.stub_gpu`) the
part of torch.cuda that the suite asks; as a program (`python -m tests.stub_gpu run …`) the benchmark with its cases
and providers replaced, measured on the CPU."""

import sys
from dataclasses import replace

import torch

FAULT = "CUDA error: an illegal memory access was encountered"
_lost = []


def lose() -> None:
    """From now on every call is answered by the fault, as after an illegal address."""
    _lost.append(FAULT)


def synchronize() -> None:
    if _lost:
        raise torch.AcceleratorError(FAULT)


def pretend() -> None:
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize


def pytest_configure() -> None:
    pretend()


def benchmark(arguments: list[str]) -> None:
    """One op of three tiny cases of which two are the reference shape's; beside eager a provider that raises and one
    that loses the GPU. What measures thinks that it is on a CPU."""
    import peft  # noqa: F401 (while there is no GPU: some libraries look for more of torch.cuda than stands here)

    from benchmarks import __main__, lora, run, specs
    from benchmarks.providers import BARE, EAGER, PEFT, Provider, all_providers

    pretend()

    def losing(case):
        lose()
        synchronize()

    def raising(case):
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = [provider for provider in all_providers("cpu") if provider.name in (BARE, EAGER, PEFT, "ours, reference")]
    found += [Provider("ours, raises", raising), Provider("ours, loses the GPU", losing)]
    lora.all_providers = lambda device: tuple(found)
    lora.REFERENCE_SHAPE = lora.Shape(12, 24, (16,), 4, torch.float32)
    cases = [replace(lora.REFERENCE_SHAPE, M=M, p=p) for M, p in ((5, 0.0), (12, 0.0), (12, 0.1))]
    spec = specs.SPECS["lora_linear"]
    specs.SPECS.clear()
    specs.SPECS["lora_linear"] = replace(
        spec, cases=lambda device: cases,
        measure=lambda case, request: spec.measure(case, replace(request, device="cpu", seconds=0.1)),
    )  # fmt: skip
    on_cpu = run.machine
    run.machine = lambda device: on_cpu("cpu") | {"gpu": "Stub GPU"}
    run.gpu_state = dict
    run.ceilings = lambda device, dtypes: {"torch.float32": 1e11, "bytes": 1e10}
    __main__.main(arguments)


if __name__ == "__main__":
    benchmark(sys.argv[1:])
