"""How much memory is free, and how much of it products keep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fastsae import environment, machine

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


# 400 shapes, of which each would keep half a megabyte on a CPU where oneDNN forms the products of bf16 matrices.
PRODUCTS = """
import torch
from fastsae import cli
cli.COMMANDS["convert"].run = lambda arguments: None
cli.main(["convert", "a", "b"])
x, weight = torch.ones(512, 256, dtype=torch.bfloat16), torch.ones(512, 256, dtype=torch.bfloat16)
torch.nn.functional.linear(x, weight)
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = memory()
for n in range(1, 401):
    torch.nn.functional.linear(x[:n], weight)
print(memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_command_keeps_no_memory_for_every_shape_of_a_product() -> None:
    own = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True, env=own)
    assert float(done.stdout) < 80  # MiB; the 400 take 200 and more


@pytest.mark.parametrize(
    "name", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"]
)
def test_the_users_own_bound_of_products_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "7")
    environment.bound_product_caches()
    assert os.environ[name] == "7"
    assert os.environ["LRU_CACHE_CAPACITY"] == ("7" if name.startswith("LRU") else "32")
    expected = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "DNNL_PRIMITIVE_CACHE_CAPACITY": None}.get(name, "32")
    assert os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == expected
