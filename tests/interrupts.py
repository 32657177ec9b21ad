"""Raise at any line of a call, as Ctrl-C does."""

import gc
import sys
from collections.abc import Callable, Iterator

import torch

#: What torch runs always-called hooks for, and what it does not.
ERRORS = [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit]


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Run `call`, with KeyboardInterrupt raised at its line of Python number `at`; whether it has that many."""
    left = at

    def trace(frame, event, arg):
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(grad)  # torch's own `no_grad` can be interrupted on its way out, too
    return False


def everywhere(call: Callable[[], object], every: int = 1) -> Iterator[int]:
    """Interrupt `call` at its first line, then at the one `every` lines later, and so on to its end. Yields after each,
    with nothing left that waits for the garbage collector."""
    gc.collect()
    gc.freeze()  # what was there before is not looked at again and again
    try:
        at = 0
        while interrupted(call, at):
            gc.collect()
            yield at
            at += every
    finally:
        gc.unfreeze()
