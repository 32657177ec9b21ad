"""Hugging Face PEFT: run the LoRA and SHiRA layers of a model by the fused ops, without touching anything else of them.

report = pk.integrations.peft.accelerate(model)
print(report)                          # which layers run fused, which share their input, which do not and why
pk.integrations.peft.restore(model)
"""

from .accelerate import accelerate, restore
from .report import Report

__all__ = ["Report", "accelerate", "restore"]
