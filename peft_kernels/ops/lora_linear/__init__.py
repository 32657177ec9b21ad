"""The LoRA linear layer, y = x·Wᵀ + bias + scaling · (D(x)·Aᵀ)·Bᵀ, alone and for projections that share x."""

from .checks import is_row_scaling
from .op import LoRALinearFunction, Projection, lora_linear, lora_linear_shared_input

__all__ = ["LoRALinearFunction", "Projection", "is_row_scaling", "lora_linear", "lora_linear_shared_input"]
