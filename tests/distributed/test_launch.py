"""The start of a run on several processes: its groups, what is refused, and what the processes agree on."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from started import TORCHRUN, WORKER, environment, messages, processes, run
from torch import distributed

from fastsae import cli
from fastsae.distributed.launch import start
from fastsae.environment import is_first, is_restart, n_processes, rank
from fastsae.errors import FastsaeError, UsageError
from fastsae.interrupt import Interrupted, Postponed

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
PLACE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OTHERS = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLACE, *OTHERS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listener() -> Iterator[str]:
    """The port of a program that takes connections and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield str(taken.getsockname()[1])


def set_place(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**PLACE, **changes}.items():
        monkeypatch.setenv(name, value)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_the_groups_of_two_times_two_processes() -> None:
    found = run("places", 4, "2")
    assert [one.status for one in found] == [0] * 4
    assert [one.out.strip() for one in found] == [
        "0 [1111, 11, 101] 9",
        "1 [1111, 11, 1010] 9",
        "2 [1111, 1100, 101] 9",
        "3 [1111, 1100, 1010] 9",
    ]


def test_one_process_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with start(1, 600, "cpu") as alone:
            assert (alone.rank, alone.size, alone.device) == (0, 1, torch.device("cpu"))
            assert all(group.processes is None for group in alone.groups)
            assert alone.agree(15) == 15
            alone.check_same({"anything": object()})
            assert not torch.distributed.is_initialized()
    with pytest.raises(OSError, match="as it is"), start() as alone:
        raise OSError("as it is")


@pytest.mark.parametrize(("size", "shard_features"), [("3", 2), ("2", 4), ("1", 2)])
def test_processes_that_cannot_share_the_features_are_refused(
    monkeypatch: pytest.MonkeyPatch, size: str, shard_features: int
) -> None:
    set_place(monkeypatch, WORLD_SIZE=size)
    expected = f"shard_features: expected a divisor of the number of processes, {size}, got {shard_features}"
    with pytest.raises(UsageError, match=expected):
        start(shard_features, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", None), ("RANK", "2"), ("RANK", "-1"), ("RANK", "a"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "x"), ("MASTER_ADDR", None), ("MASTER_ADDR", ""), ("MASTER_PORT", None), ("MASTER_PORT", "70000"),
    ],
)  # fmt: skip
def test_an_environment_that_torchrun_does_not_make_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    set_place(monkeypatch)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    got = "nothing" if value is None else repr(value)
    with pytest.raises(UsageError, match=rf"^{name}: expected .* in the environment.*, got {got}"):
        start(1, 1)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch, listener: str) -> None:
    set_place(monkeypatch, MASTER_PORT=listener)
    with pytest.raises(UsageError, match=rf"MASTER_PORT: expected a free port, but another program uses .*:{listener}"):
        start(1, 5)


@pytest.mark.parametrize("answers", [True, False])
def test_a_store_that_is_not_there_is_named_in_time(
    monkeypatch: pytest.MonkeyPatch, listener: str, answers: bool
) -> None:
    port = free_port() if answers else listener
    set_place(monkeypatch, RANK="1", MASTER_PORT=port)
    began = time.monotonic()
    with pytest.raises(
        FastsaeError, match=rf"the store of the run at 127.0.0.1:{port} .* was not reached within 1 seconds"
    ):
        start(1, 1)
    assert time.monotonic() - began < 10


def test_processes_that_never_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, WORLD_SIZE="4", MASTER_PORT=free_port())
    with pytest.raises(FastsaeError, match="processes 1, 2 and 3 did not start within 1 seconds"):
        start(1, 1)
    assert not torch.distributed.is_initialized()


def test_a_program_with_a_process_group_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        set_place(monkeypatch)
        with pytest.raises(UsageError, match="a program without a process group"):
            start(1, 1)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    set_place(monkeypatch, RANK="1", LOCAL_RANK="1")
    expected = (
        "a GPU for each process of a machine, got 1"
        if device == "cuda"
        else "each of which has its own GPU, got cuda:0"
    )
    with pytest.raises(UsageError, match=f"device: expected .*{expected}"):
        start(1, 1, device)


def test_different_options_are_named_with_the_processes_that_have_them() -> None:
    found = run("same", 3)
    assert [one.status for one in found] == [2] * 3
    (message,) = messages(found)
    assert "--lr: expected the same in all processes, got 0.001 in processes 0 and 2, 0.002 in process 1" in message
    assert message.endswith("; k as well")


def test_an_option_that_one_process_lacks_is_named() -> None:
    (message,) = messages(run("only_there", 2))
    assert "extra: expected the same in all processes, got nothing in process 0, none in process 1" in message


def test_two_runs_of_one_program() -> None:
    assert [(one.status, one.out) for one in run("twice", 2)] == [(0, "twice\n")] * 2


def test_a_signal_for_one_process_ends_all_at_the_same_step() -> None:
    found = run("signalled", 3, SIGNAL_AT="5")
    assert [one.status for one in found] == [128 + signal.SIGTERM] * 3
    assert [one.out for one in found] == ["ready\nstep 5\n"] * 3
    assert messages(found) == ["fastsae: process 0: interrupted"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_the_others_save_changes_nothing(number: int) -> None:
    with processes("signalled", 2) as both:
        for process in both:
            assert process.stdout is not None
            process.stdout.readline()
        both[1].send_signal(number)
        time.sleep(0.1)
        both[0].send_signal(number)
        ended = [process.communicate(timeout=60) for process in both]
    assert len({out for out, _ in ended}) == 1
    assert [process.returncode for process in both] == [128 + number] * 2
    assert sum("interrupted" in err for _, err in ended) == 1


def test_torchrun_passes_its_own_signal_on(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node", "2", str(WORKER), "signalled"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True) as torchrun:
        assert torchrun.stdout is not None
        assert [torchrun.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        torchrun.terminate()
        out, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    steps = out.splitlines()
    assert len(steps) == 2
    assert len(set(steps)) == 1
    assert [line for line in err.splitlines() if "fastsae:" in line and "for the reason" not in line] == [
        "fastsae: process 0: interrupted"
    ]


def test_torchrun_starts_them_again() -> None:
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", str(WORKER), "fails_once"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0
    assert sorted(ended.stdout.splitlines()) == ["restarted 0", "restarted 1"]
    assert ended.stderr.count("process 1 no longer answers") == 1


def test_a_signal_waits_for_the_agreement_of_the_others() -> None:
    asked = []

    def agree(number: int) -> int:
        asked.append(number)
        return number

    postponed = Postponed(agree)
    with postponed, postponed.at_once():
        signal.raise_signal(signal.SIGTERM)  # it waits for the others even where an exception would harm nothing
    assert asked == []
    with pytest.raises(Interrupted) as caught:
        postponed.check()
    assert (asked, caught.value.number) == ([signal.SIGTERM], signal.SIGTERM)
    with Postponed(lambda _: signal.SIGINT) as other, pytest.raises(Interrupted) as caught:
        other.check()  # the signal has reached another process
    assert caught.value.number == signal.SIGINT


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (n_processes(), rank(), is_first(), is_restart()) == (1, 0, True, False)
    monkeypatch.setenv("RANK", "3")  # left over: without a number of processes it means nothing
    assert is_first()
    set_place(monkeypatch, RANK="1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert (n_processes(), rank(), is_first(), is_restart()) == (2, 1, False, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("RANK", "0")
    assert (is_first(), is_restart()) == (True, True)


def test_wrong_arguments_are_told_by_the_first_process_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = list[float]()
    monkeypatch.setattr(time, "sleep", waited.append)
    for number, expected in (("0", 0), ("1", 1)):
        set_place(monkeypatch, RANK=number)
        waited.clear()
        with pytest.raises(SystemExit):
            cli.main(["train", "--no-such-option"])
        assert len(waited) == expected
        assert "no-such-option" in capsys.readouterr().err
