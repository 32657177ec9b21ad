"""Backward by Triton: as the reference, with every elementwise product and sum over the tokens in one pass."""

from __future__ import annotations

import functools

from . import reference
from .triton_forward import scaled, scaled_with_sums

#: As `reference.backward`.
backward = functools.partial(reference.backward, scaled=scaled, scaled_with_sums=scaled_with_sums)
