"""`python -m benchmarks model`: what each provider should take, predicted from bytes and FLOPs, on any machine.

A provider is a list of launches, forward and backward. A launch takes the largest of

    FLOPs / the matmul rate        bytes / the bandwidth        random draws / their rate

and a gap to the next one; a mode takes the sum over its launches. Each tensor counts once a launch, read or written.
A launch is taken to read what the one before it has written: that comes from the L2 cache, if it fits there beside what
this one writes. `--launches PROVIDER` shows the list.

Not in it: the host, whose launching rules at small M; the tiles and waves of a product, and how far below the matmul
rate it stays; kernels that overlap, but for a pair of ours; what torch.compile fuses; a CPU's caches and its generator
of random numbers.
"""

from .ceilings import ceilings_of_file, ceilings_of_gpu, completed
from .command import add_arguments, main
from .predict import launches_of, predicted

__all__ = ["add_arguments", "ceilings_of_file", "ceilings_of_gpu", "completed", "launches_of", "main", "predicted"]
