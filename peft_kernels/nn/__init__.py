"""Modules: parameters and one functional call each."""

from .adapted_linear import AdaptedLinear
from .lora_linear import LoRALinear
from .scaled_linear import ScaledLinear
from .sparse_delta_linear import SparseDeltaLinear

__all__ = ["AdaptedLinear", "LoRALinear", "ScaledLinear", "SparseDeltaLinear"]
