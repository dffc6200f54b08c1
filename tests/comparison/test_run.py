"""Comparisons from end to end on a tiny model: what they write, what an interruption leaves, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsae.cli import main
from fastsae.comparison import gradients
from fastsae.comparison.arms import REFERENCE
from fastsae.comparison.costs import estimate
from fastsae.comparison.run import PAGE_FILE, PLAN_FILE, RESULT_FILE, compare, new_plan
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate.gsnr import gsnr
from fastsae.interrupt import Interrupted
from fastsae.train.session import Session
from fastsae.train.trainer import Trainer

OPTIONS: dict[str, Any] = {
    "eval_dialogues": 8, "d_sae": 32, "tokens": 64 * 8, "batch_size": 64, "buffer_tokens": 256, "forward_tokens": 256,
    "block_length": 32, "init_l0": 8, "target_l0": 4, "log_every": 4, "checkpoint_every": 4, "dedup_words": 0,
}  # fmt: skip


@pytest.fixture
def options(tiny_model: Path, chats: Path) -> dict[str, Any]:
    return {"model": str(tiny_model), "dataset": str(chats), **OPTIONS}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "plain.txt"
    path.write_text("The cat sat on the mat, and then it did something else for a change.\n" * 200)
    return str(path)


def without_times(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: without_times(value) for name, value in result.items() if "seconds" not in name}
    return [without_times(value) for value in result] if isinstance(result, list) else result


def test_a_comparison_is_whole(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    arms = ["random-model", "bt-p", "fast", "frozen-decoder", "packed", "bt-f"]
    result = compare(tmp_path / "all", arms, (0, 1), text=text, progress=False, **options)
    assert [arm["name"] for arm in result["arms"]] == [
        "fast", "bt-f", "bt-p", "packed", "frozen-decoder", "random-model"
    ]  # fmt: skip
    assert json.loads((tmp_path / "all" / RESULT_FILE).read_text()) == result
    page = (tmp_path / "all" / PAGE_FILE).read_text()
    assert all(arm in page for arm in arms)
    assert result["held_out"]["dialogues"] == 8
    for arm in result["arms"]:
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        assert arm["error"] is None
        assert len(result["values"]["all"]["fvu"][arm["name"]]["seeds"]) == 2
    assert {row["reference"] for row in result["differences"]} == {REFERENCE}
    assert {row["arm"] for row in result["gsnr"]} == {*arms} - {"bt-p"}  # which has no held-out data of its own
    assert {point["context"] for point in result["leakage"]} == {"block", "packed"}
    # frozen weights share the stream of the FAST method, and so its metrics differ by the SAE alone
    folders = sorted(path.name for path in (tmp_path / "all" / "runs").iterdir())
    assert folders == ["bt-f", "bt-p", "fast", "packed", "random-model"]
    with pytest.raises(UsageError, match="complete"):
        compare(tmp_path / "all", resume=True, progress=False)
    with pytest.raises(UsageError, match="holds something"):
        compare(tmp_path / "all", arms, text=text, progress=False, **options)


def test_an_interrupted_comparison_goes_on(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(tmp_path / "whole", ["fast", "bt-f"], (0,), progress=False, **options)
    step = Trainer.train_step

    def interrupted(self: Trainer, batch: Any) -> Any:
        if self.step == 6 and self.config.sequencing == "block":
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(Interrupted, match=r"fastsae compare --output .* --resume"):
        compare(tmp_path / "killed", ["fast", "bt-f"], (0,), progress=False, **options)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert whole["warnings"][0].startswith("One seed was trained")
    assert not (tmp_path / "killed" / RESULT_FILE).exists()
    with pytest.raises(UsageError, match=r"tokens: the comparison .* was started with 512, got 1024"):
        compare(tmp_path / "killed", resume=True, progress=False, tokens=1024)
    with pytest.raises(UsageError, match="arms: the comparison"):
        compare(tmp_path / "killed", ["fast", "packed"], resume=True, progress=False)
    measured: list[str] = []

    def killed(sae: Any, *arguments: Any, **options: Any) -> Any:
        measured.append("an arm")
        if len(measured) == 2:
            raise KeyboardInterrupt
        return gsnr(sae, *arguments, **options)

    monkeypatch.setattr(gradients, "gsnr", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "killed", resume=True, progress=False)
    resumed = compare(tmp_path / "killed", resume=True, progress=False)
    assert len(measured) == 3  # the first arm's gradients were kept
    assert without_times(resumed) == without_times(whole)
    kept = next((tmp_path / "killed").rglob(gradients.GRADIENTS_FILE))
    kept.write_text("{}")
    (tmp_path / "killed" / RESULT_FILE).unlink()
    with pytest.raises(FastsaeError, match=r"gradients\.json: expected the gradients .* delete it"):
        compare(tmp_path / "killed", resume=True, progress=False)


def test_an_sae_that_fails_is_told_and_the_others_are_compared(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Session._advance

    def failing(self: Session, name: str) -> Any:
        if name == "frozen-decoder-seed-1" and self.step == 3:
            self.drop(name, FastsaeError("step 3: the loss is not finite"))
            return None
        return advance(self, name)

    monkeypatch.setattr(Session, "_advance", failing)
    result = compare(tmp_path / "run", ["fast", "frozen-decoder", "bt-f"], (0, 1), progress=False, **options)
    found = {arm["name"]: arm for arm in result["arms"]}
    assert [run["seed"] for run in found["frozen-decoder"]["runs"]] == [0]
    assert found["frozen-decoder"]["error"] == "step 3: the loss is not finite"
    assert any("frozen-decoder: an SAE of this arm failed" in warning for warning in result["warnings"])
    assert len(found["fast"]["runs"]) == len(found["bt-f"]["runs"]) == 2


def test_too_little_data_is_found_before_anything_is_trained(options: dict[str, Any], tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("Only a few words.\n")
    with pytest.raises(UsageError, match=r"text: expected at least the 512 tokens of an arm in .*few.txt.* got \d+;"):
        estimate(new_plan(["fast", "bt-p"], (0, 1), {**options, "text": str(few)}))
    with pytest.raises(UsageError, match="dataset: expected at least the 50,000,000 tokens"):
        estimate(new_plan(["fast", "bt-f"], (0, 1), {**options, "tokens": 50_000_000}))
    with pytest.raises(UsageError, match="block_length: expected at most the"):
        estimate(new_plan(["fast", "bt-f"], (0, 1), {**options, "block_length": 10**6}))


def test_the_command_tells_the_price_and_the_result(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments = [
        "compare",
        "--arms",
        "fast,bt-f",
        "--seeds",
        "0,1",
        "--output",
        str(tmp_path / "run"),
        "--quiet",
        *flags,
    ]
    assert main([*arguments, "--dry-run"]) == 0
    assert "4 SAEs, each on 512 tokens, measured on 8 held-out dialogues" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "differences from fast, with 95 % intervals" in out
    assert str(tmp_path / "run" / PAGE_FILE) in out
    assert main(["compare", "--output", str(tmp_path / "run"), "--resume"]) == 2
    assert "is complete" in capsys.readouterr().err
    assert main(["compare", "--resume"]) == 2
    assert main(["compare", "--output", str(tmp_path / "other"), "--resume"]) == 2
    assert PLAN_FILE in capsys.readouterr().err
    assert main(["compare", "--arms", "fast,slow", "--quiet"]) == 2
    assert "got 'slow'" in capsys.readouterr().err
