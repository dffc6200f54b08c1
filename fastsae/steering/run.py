"""A steering run from features and prompts to `steer.json` and its page: doses, controls, and how far one can push."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastsae.data.progress import bar
from fastsae.disk import write_json
from fastsae.steering.bench import Bench, arms_of
from fastsae.steering.calibration import Calibration
from fastsae.steering.measures import stable_range
from fastsae.steering.options import Plan, Subject, check
from fastsae.steering.page import write_steer_page
from fastsae.steering.result import Auto, Result, Run, Stable, Tried
from fastsae.version import __version__

RESULT_FILE, PAGE_FILE = "steer.json", "steer.html"
MULTIPLES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # the found strength is multiplied by these


def steer_texts(
    subject: Subject,
    plan: Plan,
    output: Path,
    *,
    streamed: Callable[[str], Any] | None = None,
    progress: bool = True,
) -> Result:
    """Writes texts with features pushed by several doses, beside those of the model as it is, and `steer.json` and a page.

    Args:
        subject: What is steered.
        plan: What is done.
        output: The folder of the two files.
        streamed: Gives, for the title of a run, a context manager whose value is told each piece of text; None tells nobody.
        progress: Show a progress bar.

    Raises:
        UsageError: An edit, a prompt or a dose does not fit, as the message says.
        FastsaeError: The model computed NaN.
    """
    check(plan)
    started = time.perf_counter()
    bench = Bench(subject, plan, streamed)
    feature, random = arms_of(subject, plan)
    auto = None
    if plan.alphas is None:
        auto = bench.calibrated(feature, progress=progress)
        plan = replace(plan, alphas=tuple(auto.alpha * multiple for multiple in MULTIPLES))
    alphas = plan.alphas or ()
    arms = [feature, random] if random else [feature]
    total = 1 + len(alphas) * len(arms) + bool(plan.instruction) + len(plan.dynamic)
    with bar("writing texts", "run", total=total, progress=progress and streamed is None) as advance:
        bench.advance = advance
        runs = [bench.unsteered()]
        if plan.instruction:
            runs.append(bench.prompted(plan.instruction))
        runs += [run for arm in arms for alpha in alphas if (run := bench.fixed(arm, alpha)) is not None]
        stable = [_stable(arm.name, runs) for arm in arms]
        reference = _reference(runs, feature.name, stable[0], auto)
        if reference is not None:
            runs += bench.matched(feature, reference)
    result = _result(subject, plan, auto, runs, stable, time.perf_counter() - started)
    output.mkdir(parents=True, exist_ok=True)
    write_steer_page(output / PAGE_FILE, result)
    write_json(output / RESULT_FILE, result)
    return result


def _stable(arm: str, runs: Sequence[Run]) -> Stable:
    found = stable_range([(run["alpha"], run) for run in runs if run["arm"] == arm], runs[0])
    return {"arm": arm, "dose": "fixed", **found._asdict(), "breaks": list(found.breaks)}  # type: ignore[typeddict-item]


def _reference(runs: Sequence[Run], arm: str, stable: Stable, auto: Calibration | None) -> Run | None:
    """The fixed dose beside which dynamic ones are set: that which was found, or the largest that holds, or the smallest."""
    pushed = [run for run in runs if run["arm"] == arm and run["alpha"] > 0 and run["mean_kl"]]
    if not pushed:
        return None
    if auto is not None:
        return min(pushed, key=lambda run: abs(run["alpha"] - auto.alpha))
    holding = [run for run in pushed if run["alpha"] <= (stable["highest"] or 0.0)]
    return max(holding, key=lambda run: run["alpha"]) if holding else min(pushed, key=lambda run: run["alpha"])


def _result(
    subject: Subject, plan: Plan, auto: Calibration | None, runs: list[Run], stable: list[Stable], seconds: float
) -> Result:
    place = subject.residual.place
    return {
        "model": subject.model_name,
        "sae": subject.name,
        "layer": place.layer,
        "hook": place.hook,
        "architecture": subject.sae.architecture,
        "positions": plan.positions,
        "mode": plan.mode,
        "unit": plan.unit,
        "max_new_tokens": plan.max_new_tokens,
        "temperature": plan.temperature,
        "seed": plan.seed,
        "features": [
            {
                "feature": one.feature,
                "chosen_by": one.chosen_by,
                "score": one.score,
                "maximum": subject.maxima.get(one.feature),
            }
            for one in plan.chosen
        ],
        "prompts": list(plan.prompts),
        "instruction": plan.instruction,
        "auto": None if auto is None else _auto(auto),
        "runs": runs,
        "stable": stable,
        "seconds": seconds,
        "versions": {"fastsae": __version__, "torch": torch.__version__},
    }


def _auto(found: Calibration) -> Auto:
    tried: list[Tried] = [{"alpha": alpha, "p95_kl": p95_kl} for alpha, p95_kl in found.tried]
    return {"alpha": found.alpha, "p95_kl": found.p95_kl, "tried": tried}
