"""Importance-aware Sparse Tuning (Yao et al., EMNLP 2024 Findings): each step trains the adapters of a few layers only.

ist = pk.ist.IST(model, pk.ist.ISTConfig())    # a training loop of your own: ist.before_step(batch) ahead of each step
trainer.add_callback(pk.ist.ISTCallback())     # transformers' Trainer

The README of this folder says what is computed and where the time goes.
"""

from .config import ISTConfig
from .ist import IST
from .layers import Layer, find_layers
from .samplers import BlockCyclic, Fixed, ImportanceSampler, LayerSampler, Lisa, Uniform

__all__ = [
    "IST",
    "BlockCyclic",
    "Fixed",
    "ISTCallback",
    "ISTConfig",
    "ImportanceSampler",
    "Layer",
    "LayerSampler",
    "Lisa",
    "Uniform",
    "find_layers",
    "last_checkpoint",
]


def __getattr__(name: str):
    if name in ("ISTCallback", "last_checkpoint"):  # need transformers, which the package does not
        from . import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
