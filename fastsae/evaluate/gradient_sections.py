"""What a report and a terminal say of gradients: signal-to-noise ratios and leakage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from fastsae.evaluate import plots
from fastsae.evaluate.metrics import number

_GROUPS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
_PLACES = {
    "begins_the_block": "its dialogue begins the block",
    "begins_behind_another": "its dialogue begins behind another one",
    "begins_before_the_block": "its dialogue begins before the block",
    "sinks": "attention sinks",
}

_Series: TypeAlias = dict[str, Sequence[plots.Point]]


def gradient_sections(metrics: dict[str, Any]) -> str:
    """The sections of what `metrics` hold under `gsnr` and `leakage`, or nothing."""
    return "\n".join(
        section(metrics[name]) for name, section in (("gsnr", _gsnr), ("leakage", _leakage)) if metrics.get(name)
    )


def summary_lines(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline numbers of both, each with what it means."""
    lines = []
    if found := metrics.get("gsnr"):
        for unit in ("token", "dialogue"):
            value = found[f"per_{unit}"]["W_dec"]["pooled"]
            lines.append((number(value), f"signal-to-noise ratio of the decoder's gradient per {unit} (GSNR)"))
    if found := metrics.get("leakage"):
        value = found["block"]["begins_behind_another"]["W_dec"]["median"]
        lines.append((number(value), "leakage into the decoder's gradient behind another dialogue of a block (median)"))
    return lines


def _table(head: list[str], rows: list[list[str]]) -> str:
    titles = "".join(f'<th class="number">{title}</th>' if i else f"<th>{title}</th>" for i, title in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f'<td class="number">{cell}</td>' if i else f"<td>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )  # fmt: skip
    return f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>'


def _loss(found: dict[str, Any]) -> str:
    if found["coefficient"] == 0:
        return "the squared error alone"
    return f"the squared error and {number(found['coefficient'])} times the sparsity term"


def _gsnr(found: dict[str, Any]) -> str:
    rows = []
    for group in _GROUPS:
        if group not in found["per_token"]:
            continue
        row = [f"<code>{group}</code>"]
        for unit in ("per_token", "per_dialogue"):
            one = found[unit][group]
            live = one.get("live", one.get("all"))
            quartiles = f"{number(live['lower_quartile'])} to {number(live['upper_quartile'])}"
            row += [number(one["pooled"]), number(live["median"]), quartiles]
        rows.append(row)
    head = ["parameter"]
    for unit in ("per token", "per dialogue"):
        head += [f"pooled, {unit}", f"median, {unit}", f"quartiles, {unit}"]
    return (
        "<h2>Gradient signal-to-noise ratios</h2>\n"
        "<p>The squared mean of a parameter's gradient over its variance, with the bias 1/N taken off, of the parameters of "
        f"features that fire; pooled is the ratio of the sums over all parameters. The loss is {_loss(found)}. "
        f"{number(found['tokens'])} tokens of {number(found['dialogues'])} dialogues, attention sinks left out; a dialogue's "
        f"gradient is the mean of its tokens', that of the weights of {number(found['sampled_features'])} features drawn at "
        "random. Of N draws of pure noise one parameter's ratio is 0, give or take 1.4/N. Training brings "
        "the mean gradient on its own data to 0, so that the ratios are as a rule higher on other data.</p>\n"
        f"{_table(head, rows)}"
    )


def _leakage(found: dict[str, Any]) -> str:
    groups = [group for group in ("activation", *_GROUPS) if group in found["block"]["sinks"]]
    ways = [("block", "in blocks")] + ([("packed", "packed (control)")] if found["packed"] else [])
    rows = [
        [f"{words}, {name}", number(found[way][place][groups[0]]["tokens"])]
        + [_median_and_pooled(found[way][place][group]) for group in groups]
        for way, name in ways
        for place, words in _PLACES.items()
    ]
    head = ["a token where", "tokens", *(f"<code>{group}</code>" if group in _GROUPS else group for group in groups)]
    of_gradients: _Series = {group: _curve(found, "begins_behind_another", group) for group in ("W_dec", "W_enc")}
    of_activations: _Series = {
        "behind": _curve(found, "begins_behind_another", "activation"),
        "cut off": _curve(found, "begins_before_the_block", "activation"),
    }
    x_label = "log2 of the own tokens before it in the block"
    charts = [
        (of_gradients, "leak of the gradient", "Dialogues that begin behind another one in their block."),
        (of_activations, "leak of the activation", "Dialogues behind another one, and those whose start is cut off."),
    ]
    figures = "".join(
        f"<figure>{plots.line_chart(series, x_label=x_label, y_label=f'{name} (median, log)', log=True)}"
        f"<figcaption>{caption}</figcaption></figure>"
        for series, name, caption in charts
    )
    return (
        "<h2>Leakage</h2>\n"
        "<p>How far the text before it in a block of "
        f"{number(found['block_length'])} tokens moves a token: |there − alone|² / |alone|² of its activation, and of the "
        "gradient that its loss gives each parameter. The median over tokens, and in brackets the ratio of the sums over all "
        f"tokens; 2 is the leak of an unrelated gradient of the same length. The loss is {_loss(found)}. In packed rows "
        "dialogues do not see each other, so that their leaks are the rounding of the model's "
        f"{found['model_dtype']}.</p>\n"
        f'{_table(head, rows)}\n<div class="charts">{figures}</div>'
    )


def _median_and_pooled(summary: dict[str, Any]) -> str:
    return f"{number(summary['median'])} ({number(summary['pooled'])})"


def _curve(found: dict[str, Any], place: str, group: str) -> list[plots.Point]:
    bins = [one for one in found["block"][place]["bins"] if one["from"] > 0 and one[group]["median"] is not None]
    return [(0.5 * (math.log2(one["from"]) + math.log2(one["to"] + 1)), one[group]["median"]) for one in bins]
