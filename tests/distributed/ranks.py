"""Two processes that stay for all tests: to start them takes longer than what they are asked to do."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

WORLD = 2
#: After this long a collective that not all take part in raises, where it would wait for ever.
PATIENCE = timedelta(seconds=120)


class Ranks:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, context, initializer=_without_gpu) for _ in range(WORLD)]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns in each process of a gloo group; it has to be a module's own."""
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            running = [pool.submit(_member, r, store, function, arguments) for r, pool in enumerate(self._pools)]
            failed = [future.exception() for future in running]
            if any(failed):
                raise next(filter(None, failed))
            return [future.result() for future in running]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()


def _without_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the two would share one


def _member(rank: int, store: Path, function: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(1)
    # As torchrun sets them, for accelerate, which finds the group there and asks no further.
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in launched.items()}):
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD, timeout=PATIENCE)
        try:
            return function(rank, *arguments)
        finally:
            dist.destroy_process_group()
