"""How much memory is free: what the machine has left, or the container, whichever is less."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fastsae import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("limit", "statistics", "free"),
    [
        ("1000000\n", "anon 300000\nfile 600000\n", 700_000),  # a cache of files is given back
        ("1000000\n", None, 1_000_000),
        ("1000000\n", "anon 2000000\n", 0),
        ("max\n", "anon 300000\n", None),
        (None, None, None),
    ],
)
def test_a_container_may_have_less_than_its_machine(
    limit: str | None, statistics: str | None, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CONTAINERS", ())
    whole = machine.free_memory(CPU)
    assert whole is None or 2**20 < whole < 2**50
    for name, text in (("limit", limit), ("statistics", statistics)):
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CONTAINERS", ((str(tmp_path / "limit"), str(tmp_path / "statistics"), "anon"),))
    if free is not None:
        assert machine.free_memory(CPU) == free
    elif whole is not None:
        assert abs(machine.free_memory(CPU) - whole) < 2**32  # that of the machine, which others use meanwhile


class HostTensor:
    """A tensor of the host that writes down how it is copied."""

    def __init__(self, place: str, *steps: object) -> None:
        self.device, self.steps = torch.device(place), steps

    def pin_memory(self) -> HostTensor:
        return HostTensor("cpu", *self.steps, "pinned")

    def to(self, device: torch.device, non_blocking: bool = False) -> HostTensor:
        return HostTensor(str(device), *self.steps, "copied without waiting" if non_blocking else "copied")


def test_only_what_goes_from_the_host_to_a_gpu_is_pinned() -> None:
    def steps(place: str, device: str) -> tuple[object, ...]:
        tensor: Any = HostTensor(place)
        return cast(Any, machine.to_device(tensor, torch.device(device))).steps

    assert steps("cpu", "cuda:0") == ("pinned", "copied without waiting")
    assert steps("cpu", "cpu") == steps("cuda:0", "cuda:0") == steps("cuda:0", "cpu") == ("copied",)
