"""Modules: parameters and one functional call each."""

from .lora_linear import LoRALinear

__all__ = ["LoRALinear"]
