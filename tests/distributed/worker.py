"""One process of a run, which does what a test asks for in the place of a command: `python worker.py SCENARIO [SHARD_FEATURES]`.

It is a program of its own, so that processes start, fail and print as those of a user do.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import torch

from fastsae import cli
from fastsae.distributed.launch import Processes, start
from fastsae.errors import FastsaeError, UsageError
from fastsae.interrupt import Postponed

TIMEOUT = float(os.environ.get("TIMEOUT", "60"))


def say(*what: object) -> None:
    sys.stdout.write(" ".join(map(str, what)) + "\n")
    sys.stdout.flush()


def exchanges(processes: Processes, n: int = 10**6, pause: float = 0.01) -> None:
    for _ in range(n):
        processes.groups.features.sum_(torch.ones(3), "a test")
        processes.groups.data.sum_(torch.ones(3), "a test")
        time.sleep(pause)


def places(processes: Processes) -> None:
    """Prints where each process stands, and what comes of an exchange with each group."""
    sums = [
        int(group.sum_(torch.tensor([10**processes.rank]), "a test"))
        for group in (processes.groups.world, processes.groups.features, processes.groups.data)
    ]
    say(processes.rank, sums, processes.agree(processes.rank * 3))


def same(processes: Processes) -> None:
    processes.check_same({"lr": 1e-3, "nan": float("nan"), "text": "ä" * (1 + processes.rank // 9)})
    processes.check_same({"lr": 1e-3 * (1 + (processes.rank == 1)), "k": processes.rank % 2, "name": "x" * 9000})


def only_there(processes: Processes) -> None:
    processes.check_same({"a": 1, **({"extra": None} if processes.rank == 1 else {})})


def exits(processes: Processes) -> None:
    if processes.rank == 1:
        os._exit(7)
    exchanges(processes)


def killed(processes: Processes) -> None:
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    exchanges(processes)


def killed_alone(processes: Processes) -> None:
    """Process 0 is killed while the others exchange nothing, and torchrun ends them by a signal."""
    exchanges(processes, 3)
    if processes.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def leaves(processes: Processes) -> None:
    """Process 1 ends before process 0, which a signal interrupts later."""
    exchanges(processes, 3)
    if processes.rank == 1:
        return
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def killed0(processes: Processes) -> None:
    if processes.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    exchanges(processes)


def killed_at_work(processes: Processes) -> None:
    """Process 1 is killed while process 0 still computes for longer than a process counts as gone."""
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if processes.rank == 0:
        time.sleep(7)
    exchanges(processes)


def slow(processes: Processes) -> None:
    exchanges(processes, 3)
    if processes.rank == 1:
        time.sleep(TIMEOUT + 4)
    exchanges(processes)


def stopped(processes: Processes) -> None:
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    exchanges(processes)


def full_disk(processes: Processes) -> None:
    exchanges(processes, 3)
    if processes.rank == 1:
        raise OSError(28, "No space left on device", "weights.safetensors")
    exchanges(processes)


def same_error(processes: Processes) -> None:
    raise UsageError("model: expected a model, got none")


def told_by_both(processes: Processes) -> None:
    """Process 1 fails, and the others learn of it and say so."""
    exchanges(processes, 3)
    if processes.rank == 1:
        time.sleep(0.5 * ("LATER" in os.environ))
        raise OSError("no space left")
    time.sleep(0.5 * ("LATER" not in os.environ))
    raise FastsaeError("process 1 could not write the checkpoint: no space left")


def interrupted(processes: Processes) -> None:
    """A signal comes where nothing is postponed: to process 1 alone, or to all of them."""
    exchanges(processes, 3)
    if processes.rank == 1 or "ALL" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    exchanges(processes)


def bug(processes: Processes) -> None:
    if processes.rank == 1:
        raise RuntimeError("shapes do not match")
    exchanges(processes)


def signalled(processes: Processes) -> None:
    """A signal reaches one process (or all, sent from outside); all end between the same two steps."""
    postponed, step = Postponed(processes.agree), 0
    with postponed:
        say("ready")
        try:
            while step < 10**6:
                step += 1
                exchanges(processes, 1)
                if "SIGNAL_AT" in os.environ and processes.rank == 1 and step == int(os.environ["SIGNAL_AT"]):
                    os.kill(os.getpid(), signal.SIGTERM)
                postponed.check()
        except KeyboardInterrupt:
            exchanges(processes, 1, pause=0.5)  # as a checkpoint does
            say("step", step)
            raise


def fails_once(processes: Processes) -> None:
    """The first time, process 1 is killed; the restarted ones say so."""
    from fastsae.environment import is_restart

    if not is_restart():
        killed(processes)
    exchanges(processes, 2)
    say("restarted", processes.rank)


def twice(processes: Processes) -> None:
    exchanges(processes, 2)
    processes.close()
    with start(2, TIMEOUT) as again:
        exchanges(again, 2)
    say("twice")


SCENARIOS: dict[str, Callable[[Processes], None]] = {
    action.__name__: action
    for action in (
        places, same, only_there, exits, killed, killed_alone, leaves, killed0, killed_at_work, slow, stopped, full_disk,
        same_error, told_by_both, interrupted, bug, signalled, fails_once, twice,
    )
}  # fmt: skip


def command(_: Namespace) -> None:
    torch.set_num_threads(1)
    if os.environ.get("FAILS_BEFORE") == os.environ.get("RANK", ""):
        raise FastsaeError("failed before the start")
    with start(int(sys.argv[2]) if len(sys.argv) > 2 else 1, TIMEOUT) as processes:
        SCENARIOS[sys.argv[1]](processes)


if __name__ == "__main__":
    cli.COMMANDS["train"].run = command  # type: ignore[attr-defined]
    cli.import_for_good = lambda model: None  # what a language model needs takes seconds to import
    sys.exit(cli.main(["train"]))
