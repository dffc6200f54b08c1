"""Which product `cpu.small` looks at, for tests of both on any CPU."""

from __future__ import annotations

import importlib

import pytest

cpu_small = importlib.import_module("fastsae_kernels.cpu.small")


def force_product(monkeypatch: pytest.MonkeyPatch, *, rough: bool, few: bool = False) -> None:
    """Forces the rough product of oneDNN with its second score on all shapes, or the plain one; its elements are many or few."""
    if rough and not cpu_small.has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_small, "has_slow_mkl", lambda: rough)
    forced = {"MIN_ROUGH_TOKENS": 1, "MIN_ROUGH_WORK": 0, "MAX_RESCORED": 1, "MIN_ELEMENTS": 2**20 if few else 0}
    for name, value in forced.items():
        monkeypatch.setattr(cpu_small, name, value)
