"""Hugging Face PEFT: run the LoRA, SHiRA and IA3 layers by fused ops and touch nothing else of a model.

report = pk.integrations.peft.accelerate(model)
print(report)                          # which layers run fused, which share their input, which do not and why
pk.integrations.peft.restore(model)
"""

from .accelerate import accelerate, restore
from .report import Report

__all__ = ["Report", "accelerate", "restore"]
