"""What `fastsae interpret` prints: a table of scores, each beside what chance gives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

_ROWS = (  # score, key of its value or none, words, factor, digits
    ("rubric", None, "rated 4 or 5, %", 100.0, 1),
    ("detection", "balanced_accuracy", "detection, balanced accuracy", 1.0, 3),
    ("detection", "auroc", "detection, AUROC", 1.0, 3),
    ("intruder", None, "intruder found", 1.0, 3),
    ("example_embedding", None, "example embedding", 1.0, 3),
)
_WIDTH, _WIDEST = 22, 30  # how wide a column is at least and at most


def print_scores(result: Mapping[str, Any]) -> None:
    """Prints the scores of each SAE with their 95 % intervals over features, and the differences that were tested."""
    saes = result["saes"]
    print(f"\njudge {result['judge']['name']}, seed {result['seed']}, {result['seconds']:.0f} s\n")
    width = min(max(_WIDTH, *(len(name) + 2 for name in saes)), _WIDEST)
    line = partial(_row, width)
    print(line("", [name[-width + 2 :] for name in saes]))
    print(line("L0", [f"{sae['l0']:.1f}" for sae in saes.values()]))
    print(line("features that fire", [f"{sae['d_sae'] - sae['dead']:,} of {sae['d_sae']:,}" for sae in saes.values()]))
    for score, key, words, factor, digits in _ROWS:
        found = [sae["scores"].get(score) for sae in saes.values()]
        if not any(found):
            continue
        cells = [_cell(summary if key is None else summary[key], factor, digits) for summary in found]
        chances = [_chance(summary["chance"], factor, digits) for summary in found]
        print(line(words, cells))
        print(line("  by chance", chances))
    failed = [sum(summary["failed"] for summary in sae["scores"].values()) for sae in saes.values()]
    if any(failed):
        print(line("answers not understood", [f"{n:,}" for n in failed]))
        print("  (they count as wrong)")
    if result["differences"]:
        print("\ndifferences of the share rated 4 or 5, in points; p-values are corrected by Holm")
    for row in result["differences"]:
        low, high = (f"{100 * end:+.1f}" for end in row["interval"])
        print(
            f"  {row['sae']} - {row['reference']}: {100 * row['difference']:+.1f} [{low}, {high}], p = {row['p_value_holm']:.3g}"
        )


def print_calls(result: Mapping[str, Any]) -> None:
    """Prints what the judge would be asked; counts of the tokens of a prompt are estimated by its letters."""
    judge = result["judge"]
    print(
        f"{judge['name']}: {judge['calls']:,} calls, about {judge['tokens']:,} tokens with answers of full length; "
        f"{judge['cached']:,} answers are known already. Nothing was asked."
    )


def _row(width: int, words: str, cells: list[str]) -> str:
    return f"{words:30}" + "".join(f"{cell:>{width}}" for cell in cells)


def _cell(summary: Mapping[str, Any], factor: float, digits: int) -> str:
    if summary["value"] is None:
        return "too few windows"
    text = f"{factor * summary['value']:.{digits}f}"
    if summary["interval"] is None:
        return text
    low, high = (f"{factor * end:.{digits}f}" for end in summary["interval"])
    return f"{text} [{low}, {high}]"


def _chance(chance: float | Mapping[str, Any], factor: float, digits: int) -> str:
    """A number that theory gives, or what was measured on silent windows."""
    return f"{factor * chance:.{digits}f}" if isinstance(chance, float) else _cell(chance, factor, digits)
