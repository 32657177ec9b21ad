"""Every distinct compilation that the scenarios ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import peft_kernels as pk
from peft_kernels.ops.core.tuning import Choice
from peft_kernels.testing.aot import Launch
from tests.aot import lora_linear, masked_linear, scaled_linear, sparse_delta
from tests.aot.phantom import Gpu
from tests.aot.record import recording
from tests.aot.scenario import Scenario

#: Each has `scenarios()`.
PACKAGES = (lora_linear, masked_linear, scaled_linear, sparse_delta)
#: Bytes that a thread may store to and load from local memory at odd sizes (`Scenario.regular`), where elements of a
#: matrix or bytes of a mask are loaded one by one; nothing elsewhere.
SPILLED_AT_ODD_SIZES = {
    "thin_kernel": 1400,
    "shrink_kernel": 1300,
    "lora_bwd_dh_db_kernel": 1000,  # on sm_100
    "lora_bwd_da_kernel": 16,
    "extended_gemm_tma_kernel": 256,
    "extended_gemm_kernel": 256,
    "scale_columns_kernel": 64,
}


class Case(NamedTuple):
    """A compilation, and the first call that asks for it, a regular one if there is one."""

    launch: Launch
    scenario: Scenario

    @property
    def name(self) -> str:
        return f"{self.launch.name}-{self.scenario.name}"


def scenarios() -> list[Scenario]:
    return [scenario for room in PACKAGES for scenario in room.scenarios()]


def cases(gpu: Gpu, wanted: Iterable[Scenario]) -> list[Case]:
    """What the launches of these scenarios compile on a GPU, each once, with the tiles that the rules pick."""
    found: dict[tuple, Case] = {}
    for scenario in _regular_first(wanted):
        _add(found, gpu, scenario)
    return list(found.values())


def candidates(gpu: Gpu, wanted: Iterable[Scenario]) -> list[Case]:
    """The same with every tile that a measurement may prefer."""
    found: dict[tuple, Case] = {}
    for scenario in _regular_first(wanted):
        number, table = 0, _Candidates(scenario.configs.CHOICES, gpu)
        while number < table.most:
            table.number = number
            with mock.patch.object(scenario.configs, "tuned", table.of):
                _add(found, gpu, scenario)
            number += 1
    return list(found.values())


def first_of_each_kernel(found: Iterable[Case]) -> list[Case]:
    first: dict[str, Case] = {}
    for case in found:
        first.setdefault(case.launch.name, case)
    return list(first.values())


def _regular_first(wanted: Iterable[Scenario]) -> list[Scenario]:
    """What both ask for is then held to what regular calls are held to."""
    return sorted(wanted, key=lambda scenario: not scenario.regular)


def _add(found: dict[tuple, Case], gpu: Gpu, scenario: Scenario) -> None:
    with recording(gpu) as launches, pk.use_backend(scenario.backend):
        scenario.run(gpu.device)
    for launch in launches:
        found.setdefault(launch.key, Case(launch, scenario))


class _Candidates:
    """An op package's table of what was measured, were the fastest tile always the candidate of this `number` (or the
    last). `most`: how many the choices have that were looked up."""

    def __init__(self, choices: Mapping[str, Choice], gpu: Gpu) -> None:
        self.number, self.most = 0, 1
        self._choices, self._architecture = choices, gpu.target.arch if gpu.target.backend == "cuda" else 0

    def of(self, _device: Any) -> _Candidates:
        return self

    def get(self, key: tuple, default: Any = None) -> Any:
        name, *values = key
        if self._choices[name].candidates is None:
            return default
        tiles = self._choices[name].candidates(*values, self._architecture)
        self.most = max(self.most, len(tiles))
        return tiles[min(self.number, len(tiles) - 1)]
