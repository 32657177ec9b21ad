"""One package per op family. Each op package: `op.py` (public functions), `reference.py`, kernels, `configs.py`,
README."""
