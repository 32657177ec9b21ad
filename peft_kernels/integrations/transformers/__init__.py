"""Hugging Face transformers: train a causal language model on logits where labels stand, and nowhere else.

handle = pk.integrations.transformers.logits_at_labels(model)  # after get_peft_model, before or after accelerate
trainer.train()
handle.remove()
"""

from .labels import Handle, logits_at_labels

__all__ = ["Handle", "logits_at_labels"]
