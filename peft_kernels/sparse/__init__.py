"""Sparse deltas of whole models. Which entries of weights they may change: scores, the best of them, drawing, dropping
and growing; putting them into a model and taking them out; files.

weights = pk.sparse.linear_weights(model, ("q_proj", "v_proj"))
layouts = pk.sparse.select(pk.sparse.magnitude(weights), density=0.01)    # {name: SparseLayout}

The README of this folder has the formulae, their sources, and what it all costs.
"""

from .deltas import add_deltas, deltas, merge_deltas, remove_deltas, sparse_layers
from .files import export_lt_sft, export_shira, import_lt_sft, import_shira, load, save
from .regrow import Regrown, candidates, drop_grow, regrow
from .scores import change, fisher, gradient, linear_weights, magnitude
from .select import random, select

__all__ = [
    "Regrown",
    "add_deltas",
    "candidates",
    "change",
    "deltas",
    "drop_grow",
    "export_lt_sft",
    "export_shira",
    "fisher",
    "gradient",
    "import_lt_sft",
    "import_shira",
    "linear_weights",
    "load",
    "magnitude",
    "merge_deltas",
    "random",
    "regrow",
    "remove_deltas",
    "save",
    "select",
    "sparse_layers",
]
