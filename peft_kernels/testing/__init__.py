"""What tests and benchmarks share: the error rule, poisoned allocations, saved tensors, inputs and the truth."""

from .bounds import assert_within_eager, ulp
from .lora_linear import LoRACase, eager, make_case, run, truth
from .memory import poisoned_allocations, saved_tensors

__all__ = [
    "LoRACase",
    "assert_within_eager",
    "eager",
    "make_case",
    "poisoned_allocations",
    "run",
    "saved_tensors",
    "truth",
    "ulp",
]
