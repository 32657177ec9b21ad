"""Triton blocks that several op packages call: device functions and the sums of split-K partials."""
