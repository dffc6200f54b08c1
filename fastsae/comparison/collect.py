"""From the folders of trained SAEs to `compare.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastsae.comparison.arms import ARMS, CONTROLS, REFERENCE, Plan, sae_name
from fastsae.comparison.differences import analyse
from fastsae.comparison.metrics import saebench_metrics
from fastsae.comparison.result import Arm, HeldOut, Result, Run
from fastsae.disk import name_of
from fastsae.errors import FastsaeError
from fastsae.evaluate.dialogues import DialogueSums
from fastsae.fields import read_json
from fastsae.train.curves import CURVES_FILE
from fastsae.train.folder import METRICS_FILE, read_config
from fastsae.version import __version__

RUNS = "runs"
L0_TOLERANCE = 0.02  # how far L0 may be from its target, as a share of it
_LAST = 0.1  # share of the training, at its end, over which an arm's own L0 is averaged


def trained(plan: Plan, output: Path, failures: Mapping[str, str]) -> dict[str, dict[int, Path]]:
    """The folders of the SAEs that did not fail, by arm and seed."""
    places = {sae: output / RUNS / stream / sae for stream, saes in plan.streams().items() for sae in saes}
    return {
        arm: {seed: places[name] for seed in plan.seeds if (name := sae_name(arm, seed)) not in failures}
        for arm in plan.arms
    }


def collect(plan: Plan, output: Path, failures: Mapping[str, str], measured: dict[str, Any]) -> Result:
    """What a comparison has found.

    Args:
        plan: What was trained.
        output: Where.
        failures: The SAEs that failed, and why.
        measured: The parts of the result that are not in the folders: `gsnr`, `leakage` and `seconds`.

    Raises:
        FastsaeError: No SAE of the reference is there, or files are damaged.
    """
    places = trained(plan, output, failures)
    if not places[REFERENCE]:
        raise FastsaeError(f"every SAE of {REFERENCE} failed: {failures[sae_name(REFERENCE, plan.seeds[0])]}")
    sums = {arm: [DialogueSums.load(place) for place in seeds.values()] for arm, seeds in places.items() if seeds}
    metrics = {place: read_json(place / METRICS_FILE) for seeds in places.values() for place in seeds.values()}
    config = read_config(next(iter(places[REFERENCE].values())))
    config = replace(config, model=name_of(config.model), dataset=name_of(config.dataset))
    d_in = sums[REFERENCE][0].d_in
    n_features = config.n_features(d_in)
    dead = {
        arm: [(round(metrics[place]["dead_share"] * n_features), n_features) for place in places[arm].values()]
        for arm in sums
    }
    values, differences = analyse(sums, [(arm, REFERENCE) for arm in sums if arm != REFERENCE], dead)
    arms = []
    for arm in plan.arms:
        own = sums.get(arm, [])
        runs = [
            _run(seed, place, metrics[place], found, counts)
            for (seed, place), found, counts in zip(places[arm].items(), own, dead.get(arm, []), strict=True)
        ]
        error = next((failures[name] for seed in plan.seeds if (name := sae_name(arm, seed)) in failures), None)
        arms.append(_arm(arm, plan, runs, error))
    return {
        "model": config.model,
        "layer": config.layer or 0,
        "dataset": config.dataset,
        "text_dataset": name_of(plan.text) if plan.text and any(ARMS[arm].needs_text for arm in plan.arms) else None,
        "d_in": d_in,
        "d_sae": n_features,
        "architecture": config.architecture,
        "seeds": list(plan.seeds),
        "held_out": _held_out(sums[REFERENCE][0]),
        "arms": arms,
        "values": values,
        "differences": differences,
        "warnings": _warnings(arms, values["all"]["l0"]),
        "config": asdict(replace(config, seed=plan.seeds[0])),
        "version": __version__,
        "gsnr": measured["gsnr"],
        "leakage": measured["leakage"],
        "seconds": measured["seconds"],
    }


def _run(seed: int, place: Path, metrics: dict[str, Any], sums: DialogueSums, dead: tuple[int, int]) -> Run:
    return {
        "seed": seed,
        "training_tokens": metrics["tokens"],
        "l0_own_data": _last_l0(place),
        "seconds": metrics["seconds"],
        "saebench": saebench_metrics(sums, *dead),
    }


def _last_l0(place: Path) -> float | None:
    """Mean L0 of the last steps, on what the SAE was trained on."""
    rows = [json.loads(line) for line in (place / CURVES_FILE).read_text(encoding="utf-8").splitlines()]
    last = [row["l0"] for row in rows if row["step"] > (1 - _LAST) * rows[-1]["step"]]
    return sum(last) / len(last) if last else None


def _arm(name: str, plan: Plan, runs: list[Run], error: str | None) -> Arm:
    target = plan.config(name, plan.seeds[0]).expected_l0
    meaning = ARMS[name].meaning
    return {
        "name": name,
        "description": meaning[:1].upper() + meaning[1:] + ".",
        "is_control": name in CONTROLS,
        "is_another_model": plan.config(name, plan.seeds[0]).random_model,
        "target_l0": None if target is None else float(target),
        "runs": runs,
        "error": error,
    }


def _held_out(sums: DialogueSums) -> HeldOut:
    n_tokens, n_sinks = (int(sums.get("tokens", name).sum()) for name in ("all_with_sinks", "sinks"))
    return {"dialogues": len(sums), "tokens": n_tokens, "sinks": n_sinks}


def _warnings(arms: Sequence[Arm], l0: dict[str, Any]) -> list[str]:
    """A sentence for a single seed, and for each arm that failed, or whose L0 is not the target on either kind of data."""
    found = []
    if max(len(arm["runs"]) for arm in arms) < 2:
        found.append(
            "One seed was trained: whether another one would change these figures is not known; give --seeds 0,1."
        )
    for arm in arms:
        name, target = arm["name"], arm["target_l0"]
        if arm["error"] is not None:
            found.append(f"{name}: an SAE of this arm failed: {arm['error']}.")
        if target is None or not arm["runs"]:
            continue
        own = [run["l0_own_data"] for run in arm["runs"]]
        held_out = l0[name]["seeds"] if l0[name] is not None else []
        for where, values in (("its own data", own), ("the held-out dialogues", held_out)):
            missed = [value for value in values if value is not None and abs(value / target - 1) > L0_TOLERANCE]
            if missed:
                farthest = max(missed, key=lambda value: abs(value / target - 1))
                found.append(
                    f"{name}: L0 on {where} is {farthest:.1f}, more than {L0_TOLERANCE:.0%} from the target of {target:g}; "
                    "part of its differences may come from that."
                )
    return found
