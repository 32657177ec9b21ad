"""The ops of the benchmark."""

from __future__ import annotations

from . import host, ist_step, linear_ops, lora, sparse_delta

SPECS = {spec.name: spec for spec in (*lora.SPECS, host.SPEC, sparse_delta.SPEC, linear_ops.SPEC, ist_step.SPEC)}
