"""Modules: parameters and one functional call each."""

from .lora_linear import LoRALinear
from .sparse_delta_linear import SparseDeltaLinear

__all__ = ["LoRALinear", "SparseDeltaLinear"]
