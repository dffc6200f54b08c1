"""Processes that die, hang or fail: the run ends in bounded time, and one message names them."""

from __future__ import annotations

import signal
import socket
import subprocess
import time

import pytest
from started import TORCHRUN, WORKER, Ended, ends, environment, messages, processes, run
from torch import distributed

from fastsae.distributed.faults import Witness, is_of_an_exchange, named
from fastsae.errors import FastsaeError

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)


def the_message(found: list[Ended]) -> str:
    (message,) = messages(found)
    return message


@pytest.mark.parametrize(("scenario", "status"), [("exits", 7), ("killed", -signal.SIGKILL)])
def test_a_process_that_dies_is_named_once(scenario: str, status: int) -> None:
    found = run(scenario, 3)
    assert [one.status for one in found] == [1, status, 1]
    assert "process 1 no longer answers: killed, or cut off" in the_message(found)


def test_a_process_at_work_for_long_is_not_taken_for_the_dead_one() -> None:
    found = run("killed_at_work", 3)
    assert [one.status for one in found] == [1, -signal.SIGKILL, 1]
    assert "process 1 no longer answers" in the_message(found)


def test_a_slow_process_is_named_with_the_option() -> None:
    found = run("slow", 3, TIMEOUT="3")
    assert [one.status for one in found] == [1] * 3
    message = the_message(found)
    assert "process 1 did not come to an exchange within 3 seconds" in message
    assert "--process-timeout" in message
    assert "process 0" not in message.partition(": ")[2].partition(": ")[2]
    assert "process 2" not in message.partition(": ")[2].partition(": ")[2]


def test_a_process_that_hangs_is_named() -> None:
    with processes("stopped", 2, TIMEOUT="3") as started:
        (found,) = ends(started[:1])
        assert started[1].poll() is None
    assert found.status == 1
    assert "process 1 no longer answers" in the_message([found])


def test_a_full_disk_of_one_process_is_told_by_it_alone() -> None:
    found = run("full_disk", 3)
    assert [one.status for one in found] == [1] * 3
    assert the_message(found).startswith(
        "fastsae: process 1: the disk is full, weights.safetensors could not be written"
    )
    assert found[0].err == "fastsae: process 0: ended, for the reason that process 1 gives\n"


def test_the_same_error_in_all_processes_is_told_once() -> None:
    found = run("same_error", 3)
    assert [one.status for one in found] == [2] * 3
    assert the_message(found).endswith("--model: expected a model, got none")


@pytest.mark.parametrize("order", [{}, {"LATER": "1"}])
def test_a_failure_that_the_others_speak_of_is_told_once(order: dict[str, str]) -> None:
    found = run("told_by_both", 3, **order)
    assert [one.status for one in found] == [1] * 3
    assert "no space left" in the_message(found)
    assert "process 1" in the_message(found)


def test_a_signal_that_cannot_wait_ends_all() -> None:
    found = run("interrupted", 2)
    assert [one.status for one in found] == [1, 128 + signal.SIGTERM]
    assert the_message(found).startswith("fastsae: process 0: process 1 was interrupted")
    found = run("interrupted", 2, ALL="1")
    assert [one.status for one in found] == [128 + signal.SIGTERM] * 2
    assert the_message(found) == "fastsae: process 0: interrupted"


def test_a_death_is_named_by_those_whom_torchrun_then_ends() -> None:
    command = [*TORCHRUN, "--nproc-per-node", "3", str(WORKER), "killed_alone"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("fastsae:") and "for the reason" not in line]
    assert len(lines) == 1
    assert "process 0 no longer answers" in lines[0]


def test_a_process_that_has_ended_before_is_not_missed() -> None:
    found = run("leaves", 2)
    assert [one.status for one in found] == [128 + signal.SIGTERM, 0]
    assert the_message(found) == "fastsae: process 0: interrupted"


def test_a_bug_of_one_process_keeps_its_traceback() -> None:
    found = run("bug", 2)
    assert [one.status for one in found] == [1, 1]
    assert "RuntimeError: shapes do not match" in found[1].err
    assert found[0].err == "fastsae: process 0: ended, for the reason that process 1 gives\n"


def test_the_death_of_the_process_that_keeps_the_store() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    ended = run("killed0", 3, store=False, MASTER_PORT=port)
    assert [one.status for one in ended] == [-signal.SIGKILL, 1, 1]
    assert "the process that keeps the store of the run no longer answers" in the_message(ended)


def test_a_process_that_fails_before_the_others_know_it() -> None:
    found = run("places", 2, FAILS_BEFORE="1", TIMEOUT="4")
    assert [one.status for one in found] == [1, 1]
    assert "process 1 did not start within 4 seconds" in found[0].err
    assert found[1].err == "fastsae: process 1: failed before the start\n"


def test_a_signal_while_others_have_not_started_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    store = distributed.HashStore()
    store.set("here/2", "1")
    with pytest.raises(FastsaeError, match="ended by a signal before processes 1 and 3 had started"):
        Witness(lambda: store, 0, 4, 60).meet()


def test_errors_of_this_process_are_no_broken_exchange() -> None:
    assert not is_of_an_exchange(RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 0"))
    assert not is_of_an_exchange(RuntimeError("shapes do not match"))
    assert not is_of_an_exchange(ValueError("gloo/transport"))
    assert is_of_an_exchange(
        RuntimeError("[gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5")
    )


def test_names() -> None:
    assert [named([3]), named([1, 3]), named([0, 1, 2])] == ["process 3", "processes 1 and 3", "processes 0, 1 and 2"]
