"""What the command line prints of a run that is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SUMMARY = (
    ("fvu", "of the variance is left unexplained (FVU), attention sinks left out", "{:.4f}"),
    ("special_fvu", "the same on special tokens", "{:.4f}"),
    ("l0", "features fire on a token (L0)", "{:.1f}"),
    ("dead_share", "of the features never fire", "{:.1%}"),
    ("mse", "squared error per element, averaged per dialogue (MSE)", "{:.4g}"),
    ("mse_with_sinks", "the same with attention sinks", "{:.4g}"),
    ("special_mse", "squared error per element on special tokens", "{:.4g}"),
    ("special_mse_with_sinks", "the same with attention sinks", "{:.4g}"),
    ("ce", "nats per token: the model's own cross-entropy", "{:.4f}"),
    ("ce_spliced", "with the reconstruction in place of the activations", "{:.4f}"),
    ("delta_loss_percent", "% change of the cross-entropy (delta loss)", "{:+.2f}"),
    ("recovered", "of the loss between zeros and the model is recovered", "{:.1%}"),
)
SUMMARY_OF_TRAINING = (
    ("padding_share", "of the tokens that the language model computed for training were padding", "{:.1%}"),
    ("sinks_left_out", "tokens were left out of training as attention sinks, beside the first of each context", "{:,}"),
)


def print_summary(metrics: dict[str, Any]) -> None:
    """The headline numbers, one a line, with what they mean."""
    of_training = [line for line in SUMMARY_OF_TRAINING if line[0] in metrics]
    for name, meaning, form in (*SUMMARY, *of_training):
        value = metrics.get(name)
        print(f"  {'undefined' if value is None else form.format(value):>10}  {meaning}")
    if metrics.get("dialogues_dropped"):
        reasons = ", ".join(f"{n:,} because {reason}" for reason, n in metrics["dropped_by_reason"].items())
        print(f"  {metrics['dialogues_dropped']:>10,}  dialogues could not be used: {reasons}")
    if metrics.get("unknown_roles"):
        words = ", ".join(f"{word!r} ({n:,})" for word, n in metrics["unknown_roles"].items())
        print(f"  {'unknown':>10}  roles, and the dialogues that have them: {words}")
    for warning in metrics.get("warnings") or ():
        print(f"  warning: {warning}")


def print_table(metrics: dict[str, dict[str, Any]], output: Path) -> None:
    """The headline numbers of several SAEs, a line each."""
    columns = (("fvu", "FVU", ".4f"), ("special_fvu", "special", ".4f"), ("l0", "L0", ".1f"), ("dead_share", "dead", ".1%"),
               ("delta_loss_percent", "delta loss", "+.1f"))  # fmt: skip
    width = max(map(len, metrics))
    print(f"\n{output}: {len(metrics)} SAEs\n{'':{width}}" + "".join(f"{title:>12}" for _, title, _ in columns))
    for name, found in metrics.items():
        cells = ["undefined" if found[key] is None else format(found[key], form) for key, _, form in columns]
        print(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
        for warning in found.get("warnings") or ():
            print(f"{'':{width}}  warning: {warning}")
