"""Ranks of a gloo process group as processes beside the test, so that engines are tested as they really run.

Starting a rank costs seconds (it imports torch and transformers), a job in a running one milliseconds, so the ranks
stay for all tests of a module and only a failure ends them: afterwards nobody knows which collective each waits in.
They meet in a file, not at a port that another pytest worker might take first.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; carries the rank's traceback."""


def _serve(rank: int, world: int, meeting: str, pipe: Connection) -> None:
    """Body of a rank's process: runs jobs until the pipe closes."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, job(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except BrokenPipeError:  # another rank failed first
            return


class Ranks:
    """Processes that run the same function at the same time, as ranks 0 to `world` - 1.

    Args:
        world: number of ranks.
        seconds: for one job, the start of the ranks included.
    """

    def __init__(self, world: int = 2, *, seconds: float = 120.0) -> None:
        self._world, self._seconds = world, seconds
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `job(*args)` on every rank and return the results in order of ranks.

        Both have to be picklable: a function of a module, plain values.

        Raises:
            RankError: with the traceback of the first rank that failed.
        """
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((job, args))
            return self._collect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks; the next job starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0.5)
            process.kill()
            process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        meeting = Path(self._folder.name) / "meeting"
        for rank in range(self._world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self._world, str(meeting), theirs),
                daemon=True,
                name=f"rank {rank}",
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self) -> list[Any]:
        deadline = time.monotonic() + self._seconds
        results: dict[int, Any] = {}
        while len(results) < self._world:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(set(range(self._world)) - results.keys())
                raise RankError(f"ranks {missing} did not answer within {self._seconds:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    fine, result = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise RankError(f"rank {rank} died; its output says why") from None
                if not fine:
                    raise RankError(f"rank {rank} raised:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(self._world)]
