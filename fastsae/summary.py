"""What the command line prints of a run that is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsae.errors import FastsaeError

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
    ("model_tokens_per_second", "tokens per second: the language model while training", "{:,.0f}"),
    ("sae_tokens_per_second", "tokens per second: the training steps alone, without it", "{:,.0f}"),
    ("padding_share", "of the tokens that the language model computed for training were padding", "{:.1%}"),
    ("sinks_left_out", "tokens were left out of training as attention sinks, beside the first of each context", "{:,}"),
)


def cost(metrics: Sequence[dict[str, Any]]) -> str:
    """Tokens and time of a run of one or several SAEs, and what the evaluation took of it."""
    last = max(metrics, key=lambda found: found["seconds"])  # others were complete before the run was interrupted
    took = last["seconds_of_evaluation"]
    text = f"{last['tokens']:,} tokens in {last['seconds']:.0f} s, of which the evaluation took {took:.0f} s"
    if len(metrics) == 1:
        return text
    alone = [found["seconds_of_evaluation_alone"] for found in metrics if found["seconds"] == last["seconds"]]
    together = max(0.0, took - sum(alone))
    return f"{text} ({together:.1f} s for all of them together, {min(alone):.1f} to {max(alone):.1f} s for each)"


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
    print(f"\n{output}: {len(metrics)} SAEs, {cost([*metrics.values()])}")
    print(f"{'':{width}}" + "".join(f"{title:>12}" for _, title, _ in columns))
    for name, found in metrics.items():
        cells = ["undefined" if found[key] is None else format(found[key], form) for key, _, form in columns]
        print(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
        for warning in found.get("warnings") or ():
            print(f"{'':{width}}  warning: {warning}")


def print_difference(found: dict[str, float]) -> None:
    """What `--check` has found.

    Raises:
        FastsaeError: The two SAEs are not the same function.
    """
    print(
        f"  {found['sae_out']:.3g}  largest difference of a reconstruction, whose largest number is {found['size']:.3g}"
    )
    print(
        f"  {found['other_features']:.0f}  of {found['tokens']:.0f} tokens have other features, where rounding decides"
    )
    if not (found["sae_out"] <= 1e-3 * found["size"] and 2 * found["other_features"] <= found["tokens"]):
        raise FastsaeError("--check: the written SAE is not the one that was read; please report it with both files")
