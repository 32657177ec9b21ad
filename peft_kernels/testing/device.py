"""Whether this process still has its GPU."""

from __future__ import annotations

import torch


def device_fault() -> str:
    """Waits for the GPU, and says in one line why this process cannot use it any more; empty where it can, or where no
    GPU is in use.

    An error of a launch (too much shared memory, say) is answered once and forgotten; after one of the device (an
    illegal address, a failed assertion) every call answers it until the process ends. So the second answer counts.
    """
    fault = ""
    for _ in range(2 if torch.cuda.is_available() and torch.cuda.is_initialized() else 0):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            fault = str(error).strip().partition("\n")[0]
        else:
            return ""
    return fault
