"""A comparison from a plan to its page: each stream of activations trains its SAEs, all are measured on the same dialogues."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsae.comparison.arms import DEFAULT_ARMS, Plan, chosen
from fastsae.comparison.collect import RUNS, collect, trained
from fastsae.comparison.gradients import measure
from fastsae.comparison.page import write_compare_page
from fastsae.comparison.result import Result
from fastsae.disk import local_path, write_json
from fastsae.errors import FastsaeError, UsageError
from fastsae.fields import Fields, read_json
from fastsae.interrupt import Interrupted
from fastsae.train.config import TrainConfig
from fastsae.train.folder import METRICS_FILE, SAES_FILE, check_writable, located
from fastsae.train.run import train_many

PLAN_FILE, RESULT_FILE, PAGE_FILE = "plan.json", "compare.json", "compare.html"
DEFAULT_SEEDS = (0, 1)
HELD_OUT = {"eval_dialogues": 200}  # the same for all arms, and enough for intervals
DEMO = {"tokens": 300_000, "block_length": 512}  # minutes, and three dialogues to a block
PLACES = ("model", "dataset", "text")  # options that may name a file

logger = logging.getLogger(__name__)


def compare(
    output: Path | str,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Trains SAEs in several ways at the same sparsity and measures all of them on the same held-out dialogues.

    Writes to `output`: `plan.json`, the SAEs under `runs/`, and at the end `compare.json` and `compare.html`.

    Args:
        output: A folder that is new or empty, or, to resume, that of a comparison.
        arms: Names of `fastsae.comparison.arms.ARMS`, by default all but `fast-paper`; the others are compared with `fast`.
        seeds: Each arm trains an SAE for each seed, which draws its weights; by default 0 and 1.
        resume: Go on with the comparison in `output`; what is given beside it must agree with its plan.
        progress: Show progress bars.
        options: Options of `TrainConfig` that all arms share, and `text`, on which the arm `bt-p` trains.

    Returns:
        What `compare.json` holds, see `fastsae.comparison.result`.

    Raises:
        UsageError: An option, or `output`, does not fit.
        FastsaeError: Every SAE of an arm failed, for the reason that the message names; the others are complete.
    """
    output = local_path(output)
    plan = saved_plan(output, arms, seeds, options) if resume else new_plan(arms, seeds, options)
    return carry_out(plan, output, resume=resume, progress=progress)


def carry_out(plan: Plan, output: Path, *, resume: bool, progress: bool) -> Result:
    """`compare`, with a plan."""
    prepare(output, plan, resume=resume)
    failures: dict[str, str] = {}
    for stream, saes in plan.streams().items():
        failures |= _train(output / RUNS / stream, saes, progress)
    seconds = sum(read_json(output / RUNS / stream / METRICS_FILE)["seconds"] for stream in plan.streams())
    started = time.perf_counter()
    places = {arm: next(iter(found.values())) for arm, found in trained(plan, output, failures).items() if found}
    measured = measure(places, progress=progress)
    result = collect(plan, output, failures, {**measured, "seconds": seconds + time.perf_counter() - started})
    write_compare_page(output / PAGE_FILE, result)
    write_json(output / RESULT_FILE, result)  # the last file: where it is, the comparison is complete
    return result


def new_plan(arms: Sequence[str] | None, seeds: Sequence[int] | None, options: Mapping[str, Any]) -> Plan:
    """The plan of what is given, with what a comparison takes where nothing is."""
    options = {name: located(value) if name in PLACES else value for name, value in options.items()}
    text = options.pop("text", None)
    if options.get("model", "demo") == "demo":
        options = {**DEMO, **options}
    if text is None and options.get("dataset", "demo") == "demo":
        text = "demo"  # the documentation of which its dialogues are made
    return Plan(chosen(arms or DEFAULT_ARMS), tuple(seeds or DEFAULT_SEEDS), {**HELD_OUT, **options}, text)


def saved_plan(
    output: Path, arms: Sequence[str] | None, seeds: Sequence[int] | None, options: Mapping[str, Any]
) -> Plan:
    """The plan of the comparison in `output`.

    Raises:
        UsageError: There is none, or one that differs from what is given.
        FastsaeError: It is corrupt.
    """
    path = output / PLAN_FILE
    try:
        found = Fields(read_json(path))
        found.check_names(("arms", "seeds", "text", "options"))
        plan = Plan(
            tuple(found.get("arms")), tuple(found.get("seeds")), found.fields("options").values, found.get("text")
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"--resume: expected the folder of a comparison, {path} is missing") from None
    except (ValueError, TypeError, UsageError) as error:
        raise FastsaeError(f"{path}: expected the plan of a comparison, got a corrupt file ({error})") from None
    given = {name: located(value) if name in PLACES else value for name, value in options.items()}
    if arms is not None:
        given["arms"] = chosen(arms)
    if seeds is not None:
        given["seeds"] = tuple(seeds)
    saved = {**plan.options, "arms": plan.arms, "seeds": plan.seeds, "text": plan.text}
    for name, value in given.items():
        if value != saved.get(name):
            raise UsageError(
                f"{name}: the comparison in {output} was started with {saved.get(name)}, got {value}; leave it out to resume, or "
                "start another comparison with a new --output"
            )
    return plan


def prepare(output: Path, plan: Plan, *, resume: bool) -> None:
    """Writes the plan into a new folder.

    Raises:
        UsageError: The folder holds something, or cannot be written, or its comparison is complete.
    """
    check_writable("--output", output)
    if resume:
        if (output / RESULT_FILE).exists():
            raise UsageError(f"--resume: the comparison in {output} is complete; nothing to do")
        return
    if output.exists() and any(output.iterdir()):
        raise UsageError(
            f"--output: expected a new or empty folder, but {output} holds something; choose another, or go on with an "
            "interrupted comparison with --resume"
        )
    output.mkdir(parents=True, exist_ok=True)
    options = dict(sorted(plan.options.items()))
    write_json(
        output / PLAN_FILE,
        {"arms": list(plan.arms), "seeds": list(plan.seeds), "text": plan.text, "options": options},
    )


def _train(folder: Path, saes: dict[str, TrainConfig], progress: bool) -> dict[str, str]:
    """Trains the SAEs of a stream, unless they are trained already; returns what went wrong, by SAE."""
    if not (folder / METRICS_FILE).exists():
        logger.info("%s: %d SAEs on one stream of activations", folder.name, len(saes))
        try:
            train_many(saes, folder, resume=(folder / SAES_FILE).exists(), progress=progress)
        except Interrupted as interruption:
            again = f"fastsae compare --output {shlex.quote(str(folder.parents[1]))} --resume"
            message = f"interrupted; what was trained is kept. Go on with: {again}"
            raise Interrupted(message, interruption.number) from None
        except FastsaeError as error:
            if not (folder / METRICS_FILE).exists():
                raise
            logger.warning("%s", error)
    failures: dict[str, str] = read_json(folder / METRICS_FILE)["failures"]
    return failures
