"""The curves as a run goes: one line for each point, whatever happens to the run."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import make_config, stopped_run

from fastsae import FastsaeError
from fastsae.train.curves import CURVES_FILE
from fastsae.train.folder import read_config
from fastsae.train.run import train


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / CURVES_FILE).read_text().splitlines()]


def test_a_line_for_each_point(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    train(make_config(tiny_model, chats), tmp_path / "run", progress=False)
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 13))
    assert {"loss", "l0", "fvu", "lr", "dead_share", "tokens_per_second"} < lines(tmp_path / "run")[0].keys()


def test_a_resumed_run_has_no_point_twice(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output = stopped_run(make_config(tiny_model, chats, checkpoint_every=4), tmp_path / "run", at=7)
    assert [row["step"] for row in lines(output)] == [1, 2, 3, 4, 5, 6, 7]
    train(read_config(output), output, resume=True, progress=False)
    assert [row["step"] for row in lines(output)] == list(range(1, 13))


def test_wandb_gets_the_same_numbers(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own client is asked for the same calls; a stand-in takes them, as the real one starts a service."""
    logged, begun = [], {}

    class Run:
        finish = staticmethod(lambda: begun.update(finished=True))

        @staticmethod
        def log(row: dict[str, float], step: int) -> None:
            logged.append((step, row))

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.init = lambda **options: begun.update(options) or Run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(make_config(tiny_model, chats, log="wandb"), tmp_path / "run", progress=False)
    assert (begun["project"], begun["name"], begun["finished"]) == ("fastsae", "run", True)
    assert begun["config"]["d_sae"] == 32
    assert [step for step, _ in logged] == list(range(1, 13))
    assert [row["loss"] for _, row in logged] == [row["loss"] for row in lines(tmp_path / "run")]


def test_tensorboard_gets_the_same_numbers(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    train(make_config(tiny_model, chats, log="tensorboard"), tmp_path / "run", progress=False)
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert [point.value for point in found.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in lines(tmp_path / "run")]
    )


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_message(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = replace(make_config(tiny_model, chats), log=name)
    with pytest.raises(FastsaeError, match=f"--log {name}: .* not installed: pip install {name}"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
