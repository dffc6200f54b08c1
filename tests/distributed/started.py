"""Starts the processes of `worker.py`, as `torchrun` does, and waits for their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
WORKER = Path(__file__).with_name("worker.py")
LIMIT = 60  # seconds for a run, of which the start takes most


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", **changes}


def hear_ctrl_c() -> None:
    """In a new process: a shell lets the jobs that it runs in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def processes(
    scenario: str, size: int, *arguments: str, store: bool = True, **changes: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts them beside a store of this process; with `store=False` process 0 keeps it, on MASTER_PORT."""
    kept = (
        distributed.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=LIMIT), wait_for_workers=False)
        if store
        else None
    )
    own = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(kept.port)} if kept is not None else {}
    started = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        started.append(
            subprocess.Popen(
                [sys.executable, str(WORKER), scenario, *arguments],
                env=environment(**place, **own, **changes),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=hear_ctrl_c,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ends(started: list[subprocess.Popen[str]]) -> list[Ended]:
    """What became of them, once all have ended.

    Raises:
        subprocess.TimeoutExpired: One has not within a minute.
    """
    end = time.monotonic() + LIMIT
    found = []
    for process in started:
        out, err = process.communicate(timeout=max(0.1, end - time.monotonic()))
        found.append(Ended(process.returncode, out, err))
    return found


def run(scenario: str, size: int, *arguments: str, store: bool = True, **changes: str) -> list[Ended]:
    with processes(scenario, size, *arguments, store=store, **changes) as started:
        return ends(started)


def messages(found: list[Ended]) -> list[str]:
    """The lines on stderr of all processes, without those that only say that another one gives the reason."""
    lines = [line for one in found for line in one.err.splitlines()]
    return [line for line in lines if line.strip() and "ended, for the reason that" not in line]
