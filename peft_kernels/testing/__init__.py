"""Tools that tests and benchmarks share: the error rule, poisoned allocations, saved tensors, inputs and the float64
reference."""

from .bounds import assert_within_eager, ulp
from .lora_linear import LoRACase, eager, float64_reference, make_case, run
from .memory import poisoned_allocations, saved_tensors

__all__ = [
    "LoRACase",
    "assert_within_eager",
    "eager",
    "float64_reference",
    "make_case",
    "poisoned_allocations",
    "run",
    "saved_tensors",
    "ulp",
]
