"""What GPUs can do at most: the ceilings that times are predicted from where nothing was measured."""

from __future__ import annotations

from typing import NamedTuple

from ..resultfile import ResultFile
from .launches import Ceilings


class Gpu(NamedTuple):
    """As published: dense 16-bit FLOP/s on the tensor cores, float32 FLOP/s outside of them (torch's default for
    float32), bytes/s, L2 in MiB, multiprocessors, boost clock in GHz."""

    flops: float
    flops_float32: float
    bytes: float
    l2_mib: int
    sms: int
    ghz: float


#: Peaks from NVIDIA's data sheets and architecture papers, of the SXM boards where there are several.
PUBLISHED = {
    "h200": Gpu(989e12, 67e12, 4.8e12, 50, 132, 1.98),
    "h100": Gpu(989e12, 67e12, 3.35e12, 50, 132, 1.98),
    "a100": Gpu(312e12, 19.5e12, 2.039e12, 40, 108, 1.41),  # of 80 GB
    "l40s": Gpu(362e12, 91.6e12, 0.864e12, 96, 142, 2.52),
}
#: An H200 was measured to reach 790 TFLOP/s in bfloat16 products and 4.3 TB/s in a copy (read + written). Of the
#: other GPUs, and of float32, nothing was measured: they are taken to reach the same share of what is published.
OF_FLOPS = 790e12 / PUBLISHED["h200"].flops
OF_BYTES = 4.3e12 / PUBLISHED["h200"].bytes
#: From the end of one kernel to the start of the next in a stream that is never empty. Assumed, not measured.
GAP_US = 1.5
#: Counted, not measured: 8192·4096 draws by Philox take an H200's integer units 35 µs. Others by processors and clock.
DRAWS = 8192 * 4096 / 35e-6 / (PUBLISHED["h200"].sms * PUBLISHED["h200"].ghz)


def ceilings_of_gpu(name: str) -> Ceilings:
    gpu = PUBLISHED[name]
    sixteen_bits = dict.fromkeys(("torch.bfloat16", "torch.float16"), OF_FLOPS * gpu.flops)
    rates = {"torch.float32": OF_FLOPS * gpu.flops_float32, "bytes": OF_BYTES * gpu.bytes}
    return sixteen_bits | rates | _beside(gpu)


def ceilings_of_file(file: ResultFile) -> Ceilings:
    """What was measured for the file; of a GPU with what the rates leave out, which is published or assumed."""
    if file.machine.get("device") != "cuda":
        return file.ceilings
    return completed(file.ceilings, file.machine.get("gpu", ""))


def completed(rates: Ceilings, name: str) -> Ceilings:
    """What was measured on a GPU of that name, with what is published or assumed."""
    gpu = next((gpu for key, gpu in PUBLISHED.items() if key in name.lower()), PUBLISHED["h200"])
    return _beside(gpu) | rates


def _beside(gpu: Gpu) -> Ceilings:
    return {"l2": gpu.l2_mib << 20, "sms": gpu.sms, "draws": DRAWS * gpu.sms * gpu.ghz, "gap_us": GAP_US}
