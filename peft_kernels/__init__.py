"""Hand-written Triton and CUDA kernels for fused parameter-efficient fine-tuning (PEFT).

Importing this package has no side effect beyond registering its ops with torch, and needs no GPU, no nvcc
and no Triton.
"""

from . import integrations, ist, nn, optim, sparse
from .backends import use_backend
from .ops.lora_linear import Projection, lora_linear, lora_linear_shared_input
from .ops.masked_linear import masked_linear
from .ops.scaled_linear import scaled_linear
from .ops.sparse_delta import SparseDelta, SparseLayout, sparse_delta_linear, with_sparse_gradient_

__version__ = "0.1.0"

__all__ = [
    "Projection",
    "SparseDelta",
    "SparseLayout",
    "integrations",
    "ist",
    "lora_linear",
    "lora_linear_shared_input",
    "masked_linear",
    "nn",
    "optim",
    "scaled_linear",
    "sparse",
    "sparse_delta_linear",
    "use_backend",
    "with_sparse_gradient_",
]
