"""One room per op family. Each room: `op.py` (public functions), `reference.py`, kernels, `configs.py`, README."""
