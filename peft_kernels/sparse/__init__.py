"""Which entries of weights a sparse delta may change: scores, the best of them, drawing, dropping and growing.

weights = pk.sparse.linear_weights(model, ("q_proj", "v_proj"))
layouts = pk.sparse.select(pk.sparse.magnitude(weights), density=0.01)    # {name: SparseLayout}

The README of this folder has the formulae, their sources, and what it all costs.
"""

from .regrow import Regrown, candidates, drop_grow
from .scores import change, fisher, gradient, linear_weights, magnitude
from .select import random, select

__all__ = [
    "Regrown",
    "candidates",
    "change",
    "drop_grow",
    "fisher",
    "gradient",
    "linear_weights",
    "magnitude",
    "random",
    "select",
]
