"""Protects the other providers and the run from one that raises, does not come back or loses the GPU.

An exception is caught, and becomes that provider's row. A lost device and a call that does not end cost the whole
process: `lose` is told, notes it in the result file, and ends the process, so that the same command goes on in a fresh
one without that provider.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from peft_kernels.testing.device import device_fault

#: Exit status of a run that a provider took with it.
LOST = 3
_BEAT = 5.0  # seconds


def raise_lost(provider: str, why: str) -> NoReturn:
    raise RuntimeError(f"{provider}: {why}")


class Guard:
    """Runs the code of providers:

        with guard("PEFT"):
            built = provider.build(case)
        if "PEFT" in guard.failed: …

    Args:
        limit: seconds that a provider may take at a time; None: any. A thread enforces it, and faulthandler's where
            that thread cannot run because a call that waits for the GPU holds the GIL.
        lose: called with a provider and what it did; does not return. Another thread calls it if time is over.

    Attributes:
        failed: provider → what it raised, in a line.
        without: provider → why it is not tried: what it did to an earlier process.
    """

    def __init__(self, limit: float | None = None, lose: Callable[[str, str], NoReturn] = raise_lost) -> None:
        self.limit, self.lose = limit, lose
        self.failed: dict[str, str] = {}
        self.without: dict[str, str] = {}
        self._running: tuple[str, float] | None = None  # who, since when
        self._closed = threading.Event()
        if limit is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def __call__(self, provider: str) -> Iterator[None]:
        outer, self._running = self._running, (provider, time.monotonic())
        try:
            yield
        except Exception as error:  # any: it is other people's code, and the others have to be measured
            self._check(provider)
            self.failed.setdefault(provider, one_line(error))
        finally:
            self._running = outer and (outer[0], time.monotonic())

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _check(self, provider: str) -> None:
        if fault := device_fault():
            self.lose(provider, fault)

    def _watch(self) -> None:
        while not self._closed.wait(min(_BEAT, self.limit / 4)):
            faulthandler.dump_traceback_later(self.limit + 6 * _BEAT, exit=True)
            running = self._running
            if running and time.monotonic() - running[1] > self.limit:
                faulthandler.dump_traceback(sys.stderr)
                self.lose(running[0], f"it did not come back within {self.limit:g} s")
                os._exit(LOST)


def one_line(error: BaseException) -> str:
    """Return the error's type and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def failures(guard: Guard) -> list[dict[str, object]]:
    """Return a row for each provider that failed."""
    return [{"provider": provider, "failed": why} for provider, why in guard.failed.items()]
