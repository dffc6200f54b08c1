"""Whole training runs: `fastsae train` and SAELens' runner on the same model and dialogues, one SAE and eight on one stream.

What a run's time holds, and what both sides share, says `benchmarks.runs`. Each run has a process of its own. A round has one of
each provider, in an order that the next round turns around. There are two rounds, as whole runs take long; what runs without
--full has one, and few tokens.
"""

from __future__ import annotations

import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from benchmarks.harness import Call, Case, Group, Outcome, Provider, cases_and_providers, report
from benchmarks.peers import PEERS, why_not
from benchmarks.result import RUNS
from benchmarks.runs import BATCH_TOKENS, PARTS, TARGET_L0, Run, Took, take
from benchmarks.runs_data import DEMO, SMOLLM2, Model, chats, new_folder
from benchmarks.shapes import DEVICE, Shape
from benchmarks.tables import ALONE, CACHE, TRAIN

ROUNDS = 2
SAELENS = PEERS[0].title
NUMBERS = {1: "one", 8: "eight"}
WAYS = {"--sequencing packed": "packed", CACHE: "cache", "--activations": "cached"}


@cache
def stored(model: Model) -> str:
    """Returns the folder of a model's activations."""
    return new_folder()


def whole_run(runner: str, model: Model, options: dict[str, Any]) -> Call:
    folder = stored(model)
    if runner == "cache":
        shutil.rmtree(folder, ignore_errors=True)  # the round before has written them
    run = Run(model.folder, model.layer, model.d_in, **options, chats=chats(), output=new_folder(), cache=folder)
    return partial(take, runner, run)


def case(
    model: Model,
    expansion: int,  # features of an SAE for each dimension of the model
    n_saes: int,
    tokens: int,  # that each SAE is trained on
    goal: float | None = None,  # how many times as fast as SAELens ours should be
    batch_tokens: int = BATCH_TOKENS,
    ways: bool = False,  # whether other ways to get the same activations are timed as well
) -> Case:
    """Returns the runs of one set-up."""
    shape = Shape(batch_tokens, model.d_in, expansion * model.d_in, TARGET_L0)
    options: dict[str, Any] = {
        "d_sae": shape.d_sae, "tokens": tokens, "batch_tokens": batch_tokens, "buffer_tokens": min(tokens, 32_768),
        "n_saes": n_saes,
    }  # fmt: skip

    def provider(runner: str, **changes: Any) -> Provider:
        def skip() -> str | None:
            if DEVICE == "cuda":
                return "a GPU works while the host goes on, so that a host's timers do not tell the parts"
            return model.why_not() or (why_not(runner) if runner == "sae-lens" else None)

        return Provider(partial(whole_run, runner, model, {**options, **changes}), skip=skip)

    providers = {SAELENS: provider("sae-lens"), TRAIN: provider("fastsae")}
    if n_saes > 1:
        providers[ALONE] = provider("fastsae", n_saes=1)
    if ways:  # a round that goes backwards reads the activations that the one before has written
        providers |= {name: provider(runner) for name, runner in WAYS.items()}
    subject = f"{NUMBERS[n_saes]} JumpReLU SAE{'s' * (n_saes > 1)}"
    return Case(RUNS, f"{model.name} x{expansion}", shape, providers, "fp32", subject=subject, goal=goal)


class Runs(Group):
    """The whole runs of a case."""

    def __init__(self, case: Case, save: Callable[[], None]) -> None:
        super().__init__(case)
        self._save = save  # after each run, as the next one takes long
        self._took: dict[str, list[Took]] = defaultdict(list)

    def _measure(self, names: list[str], number: int) -> None:
        baseline = next(iter(self.outcomes.values()))
        for name in names[:: -1 if number % 2 else 1]:
            with self._guarded(name):
                if self._may_run(name, number):
                    self._took[name].append(self.case.providers[name].make()())
                    self._add(self.outcomes[name], self._took[name], number)
                    self.outcomes[name].fill_in(baseline)
            self._save()

    @staticmethod
    def _add(outcome: Outcome, took: list[Took], number: int) -> None:
        row, last = outcome.row, took[-1]
        outcome.rounds[number] = [last.seconds]
        row.run_tokens, row.n_saes, row.padding_share = last.tokens, last.n_saes, last.padding_share
        row.parts_s = {part: statistics.median(run.parts.get(part, 0.0) for run in took) for part in PARTS}
        row.peak_mib = max((run.peak_mib for run in took if run.peak_mib is not None), default=None)


GROUPS: dict[str, Runs] = {}  # those that were measured
TINY = [case(DEMO, 4, n_saes, 4096, batch_tokens=1024, ways=n_saes == 1) for n_saes in NUMBERS]
CASES = [
    *TINY,
    case(DEMO, 16, 1, 49_152, goal=2.0, ways=True),
    case(DEMO, 16, 8, 16_384, goal=3.0),
    case(DEMO, 32, 1, 40_960, goal=3.0),
    case(SMOLLM2, 16, 1, 16_384, goal=2.0),
]


@cases_and_providers(CASES)
def test_run(benchmark: Any, pytestconfig: pytest.Config, run: Any, case: Case, provider: str) -> None:
    is_tiny = case in TINY
    if is_tiny and pytestconfig.getoption("--full"):
        pytest.skip("larger runs show it")
    if case.group not in GROUPS:
        group = GROUPS[case.group] = Runs(case, run.save)
        run.rows += [outcome.row for outcome in group.outcomes.values()]
        for _ in range(1 if is_tiny else ROUNDS):
            group.measure()
    report(benchmark, GROUPS[case.group], provider)
