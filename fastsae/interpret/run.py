"""From SAEs to what their features mean: examples, scores by a judge, `interpret.json` and pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

from fastsae.disk import write_json
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate.statistics import holm, newcombe, two_shares_p_value
from fastsae.fields import read_json
from fastsae.interpret.examine import Examined, Subject, examine
from fastsae.interpret.features_page import PageHeader, write_features_page
from fastsae.interpret.judges.protocol import Judge
from fastsae.interpret.neuronpedia import export_neuronpedia
from fastsae.interpret.page_data import Explanation, Score
from fastsae.interpret.scores import SCORES, score_features
from fastsae.version import __version__

PAGE_FILE, RESULT_FILE = "features.html", "interpret.json"
N_SCORED = 128  # as in the paper
N_SHOWN = 200
Result: TypeAlias = dict[str, Any]
"""What `interpret.json` holds: `judge`, `seed`, `seconds`, `saes` (name to facts, `scores` and `features`), `differences`."""


def interpret(
    subjects: Sequence[Subject],
    output: Path,
    judge_of: Callable[[Any], Judge],
    *,
    scores: Sequence[str] = SCORES,
    features: Sequence[int] | int = N_SCORED,
    seed: int = 0,
    progress: bool = True,
    writes: bool = True,
    neuronpedia: Path | None = None,
) -> Result:
    """Scores features of SAEs and writes what was found: `interpret.json` in `output`, and a page in each SAE's folder.

    Args:
        subjects: The SAEs; several of them are compared, and have to read the same dialogues.
        output: The folder of `interpret.json`.
        judge_of: Makes the judge, given the tokenizer whose ids the windows hold.
        scores: Names of `fastsae.interpret.scores.SCORES`.
        features: The features that are scored, or how many are drawn.
        seed: Determines examples, features and windows.
        progress: Show progress bars.
        writes: Write the result and the pages; examples are written in any case.
        neuronpedia: A folder for the features of the pages in SAEDashboard's format, each SAE in a folder of its own.

    Raises:
        UsageError: The SAEs do not read the same dialogues, or an option does not fit.
        FastsaeError: The judge cannot work, or a file is damaged; the examples stay.
    """
    if unknown := [name for name in scores if name not in SCORES]:
        raise UsageError(f"scores: expected some of {', '.join(SCORES)}, got {unknown[0]!r}")
    started = time.perf_counter()
    n_shown = N_SHOWN if isinstance(features, int) else 0
    options: dict[str, Any] = {"seed": seed, "scored": features, "n_shown": n_shown, "progress": progress}
    examined = [examine(subject, **options) for subject in subjects]
    _check_same_dialogues(examined)
    for one in examined:
        if not one.scored:
            raise UsageError(
                f"{one.subject.name}: no feature fires in five of the {one.store.n_dialogues:,} dialogues, as a score needs at "
                "least; read more of them with --eval-dialogues"
            )
    judge = judge_of(examined[0].tokenizer)
    saes = {}
    for one in examined:
        found = score_features(one.store, judge, one.tokenizer, one.scored, seed, scores, progress=progress)
        saes[one.subject.name] = {**_facts(one), "scores": found["scores"], "features": found["features"]}
    result: Result = {
        "judge": {"name": judge.name, **judge.facts()},
        "seed": seed,
        "saes": saes,
        "differences": _differences(saes),
        "seconds": time.perf_counter() - started,
        "versions": {"fastsae": __version__},
    }
    if writes:
        for one in examined:
            write_page(one, result, neuronpedia)
        write_json(output / RESULT_FILE, result)
    return result


def write_pages(
    subjects: Sequence[Subject],
    output: Path,
    *,
    features: Sequence[int] | int = N_SHOWN,
    seed: int = 0,
    progress: bool = True,
    neuronpedia: Path | None = None,
) -> list[Path]:
    """Writes the page of each SAE, with what `interpret` left in `output`, and returns their paths.

    Args:
        subjects: The SAEs.
        output: The folder of `interpret.json`, where there is one.
        features: The features that are shown, or how many are chosen: those with scores, and others as `examine` says.
        seed: Determines examples and features.
        progress: Show progress bars.
        neuronpedia: As for `interpret`.

    Raises:
        UsageError: As `examine`.
        FastsaeError: As `examine`.
    """
    result = _earlier_result(output / RESULT_FILE)
    pages = []
    for subject in subjects:
        known = result if subject.name in result["saes"] else None
        chosen = [row["feature"] for row in result["saes"][subject.name]["features"]] if known else []
        n_shown = features if isinstance(features, int) else 0
        scored = chosen[:n_shown] if isinstance(features, int) else features
        one = examine(subject, seed=seed, scored=scored, n_shown=n_shown, progress=progress)
        pages.append(write_page(one, known, neuronpedia))
    return pages


def explanations_in(folder: Path) -> dict[int, str]:
    """What `interpret` calls features of the SAE in `folder`, by their index; none where it left nothing there.

    Raises:
        FastsaeError: Its file is damaged.
    """
    saes = _earlier_result(folder / RESULT_FILE)["saes"]
    rows = next(iter(saes.values()))["features"] if len(saes) == 1 else []
    names = {row["feature"]: (row.get("rubric") or {}).get("name") for row in rows}
    return {feature: str(name) for feature, name in names.items() if name}


def _earlier_result(path: Path) -> Result:
    """What `interpret` has left, or a result without SAEs."""
    if not path.exists():
        return {"saes": {}}
    try:
        result = read_json(path)
        if not all(isinstance(row["feature"], int) for sae in result["saes"].values() for row in sae["features"]):
            raise ValueError("a feature is no number")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FastsaeError(
            f"{path}: expected what `fastsae interpret` writes, got a damaged file ({error}); delete it, or interpret again"
        ) from None
    return dict(result)


def write_page(one: Examined, result: Result | None, neuronpedia: Path | None) -> Path:
    """Writes the page of an SAE's features, with their scores where `result` has some; returns its path."""
    rows = {} if result is None else {row["feature"]: row for row in result["saes"][one.subject.name]["features"]}
    method = "" if result is None else result["judge"]["name"]
    features = [
        replace(
            feature,
            explanation=_explanation(rows.get(feature.examples.feature, {}), method),
            scores=_scores(rows.get(feature.examples.feature, {})),
        )
        for feature in one.shown
    ]

    def token_text(token: int) -> str:
        return str(one.tokenizer.decode([token]))

    if neuronpedia is not None:
        store, name = one.store, one.subject.name
        facts: dict[str, Any] = {key: store.facts[key] for key in ("model", "layer", "dataset")}
        vectors = one.subject.sae.W_dec.detach()[[feature.examples.feature for feature in one.shown]].tolist()
        export_neuronpedia(
            neuronpedia / name, features, token_text, name=name, n_dialogues=store.n_dialogues, vectors=vectors, **facts
        )
    path = one.subject.folder / PAGE_FILE
    write_features_page(path, _header(one, result), features, token_text)
    return path


def _check_same_dialogues(examined: Sequence[Examined]) -> None:
    first = examined[0]
    for other in examined[1:]:
        if other.store.facts["held_out"] != first.store.facts["held_out"]:
            raise UsageError(
                f"{other.subject.name} was held out other dialogues than {first.subject.name}, so that their scores could not be "
                "compared; give --dataset, --eval-dialogues and --seed, which then hold for all, or interpret them one by one"
            )


def _facts(one: Examined) -> dict[str, Any]:
    store = one.store
    facts = {name: value for name, value in store.facts.items() if not name.endswith("fingerprint")}
    counts = store.counts
    return {
        **facts,
        "architecture": one.subject.sae.architecture,
        "d_sae": store.d_sae,
        "training_seed": one.subject.training_seed,
        "dialogues": store.n_dialogues,
        "tokens": store.n_tokens,
        "l0": counts.sum().item() / store.n_tokens,
        "dead": int((counts == 0).sum()),
        "features_with_five_contexts": len(store.alive()),
    }


def _differences(saes: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences of the shares of high ratings, with Newcombe's intervals, and p-values corrected over all of them by Holm."""
    rows = []
    for name, reference in combinations(saes, 2):
        ratings = [saes[one]["scores"].get("rubric") for one in (name, reference)]
        if not all(rating and rating["of"] for rating in ratings):
            continue
        counts = [rating[key] for rating in ratings for key in ("hits", "of")]
        interval = newcombe(*counts)
        rows.append(
            {
                "sae": name,
                "reference": reference,
                "score": "rubric",
                "difference": ratings[0]["value"] - ratings[1]["value"],
                "interval": None if interval is None else list(interval),
                "p_value": two_shares_p_value(*counts),
            }
        )
    for row, corrected in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value_holm"] = corrected
    return rows


def _header(one: Examined, result: Result | None) -> PageHeader:
    store = one.store
    facts = [
        ("model", str(store.facts["model"])),
        ("place", f"{store.facts['hook']} of layer {store.facts['layer']}"),
        ("features", f"{store.d_sae:,}, of which {int((store.counts > 0).sum()):,} fire"),
        ("examples", f"{store.n_tokens:,} tokens of {store.n_dialogues:,} dialogues of {store.facts['dataset']}"),
    ]
    if result is not None:
        facts.append(("judge", str(result["judge"]["name"])))
    return PageHeader(f"Features of {one.subject.name}", facts)


def _explanation(row: dict[str, Any], method: str) -> Explanation | None:
    rating = row.get("rubric")
    return Explanation(rating["name"], method) if rating and rating["name"] else None


def _scores(row: dict[str, Any]) -> list[Score]:
    """The scores of a feature that could be measured."""
    found = []
    if rating := row.get("rubric"):
        found.append(Score("rubric", rating["score"], least=1.0, most=5.0))
    for name, key, chance in (
        ("detection", "balanced_accuracy", 0.5),
        ("intruder", "value", 0.2),
        ("example_embedding", "value", 0.5),
    ):
        if row.get(name):
            found.append(Score(name.replace("_", " "), row[name][key], chance))
    return found
