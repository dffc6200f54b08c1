"""The sections of `compare.html` on gradients."""

from __future__ import annotations

from html import escape

from fastsae.comparison import charts
from fastsae.comparison.cells import arm_name, bracket
from fastsae.comparison.result import Result
from fastsae.evaluate.metrics import number


def leakage_section(result: Result) -> str:
    """What blocks do to the gradient of a token, as HTML."""
    title = "<h2>Leakage between dialogues</h2>\n"
    if not result["leakage"]:
        return title + "<p>Not measured in this comparison.</p>"
    in_block = [
        (1 + p["distance"], max(p["low"] or 0.0, 1e-3 * p["leak"]), p["leak"], p["high"] or p["leak"])
        for p in result["leakage"]
        if p["context"] == "block" and p["leak"] > 0
    ]
    control = [p["leak"] for p in result["leakage"] if p["context"] == "packed"]
    label = "1 + tokens of its own dialogue before it in the block"
    chart = charts.band(in_block, label, "leak (log scale)")
    said = ""
    if control:
        found = f"at most {number(max(control), 2)}, the limit of the numerics" if max(control) else "0"
        said = f" There it is {found}."
    return (
        f"{title}<p>The leak of a token is ||g − g<sub>alone</sub>||² / ||g<sub>alone</sub>||²: g is the gradient that it gives "
        "the SAE's decoder when it stands in a block and its dialogue begins behind another one, g<sub>alone</sub> the one when "
        "its dialogue is alone; 2 is the leak of an unrelated gradient of the same length. "
        f" The control is a pack of dialogues whose attention is masked.{said}</p><figure>{chart}<figcaption>Median over "
        "tokens in a block, and the quartiles.</figcaption></figure>"
    )


def gsnr_section(result: Result) -> str:
    """The gradients' signal-to-noise ratios of all arms, as HTML."""
    title = "<h2>Gradient signal-to-noise ratio</h2>\n"
    if not result["gsnr"]:
        return title + "<p>Not measured in this comparison.</p>"
    tables = "".join(
        f"<h3>per {escape(unit)}</h3>{_gsnr_table(result, unit)}"
        for unit in dict.fromkeys(row["unit"] for row in result["gsnr"])
    )
    dead = [row for row in result["gsnr"] if row["features"] == "dead"]
    body = "".join(
        f"<tr><td>{arm_name(row['arm'])}</td><td><code>{escape(row['group'])}</code></td><td>{escape(row['unit'])}</td>"
        f'<td class="number">{number(row["median"])} {bracket(row["low"], row["high"])}</td></tr>'
        for row in dead
    )
    head = '<tr><th>arm</th><th>parameters</th><th>per</th><th class="number">median and quartiles</th></tr>'
    details = f'<details><summary>Dead features</summary><div class="wide"><table>{head}{body}</table></div></details>'
    return (
        f"{title}<p>GSNR of a parameter: (E g)² / Var g over tokens or dialogues, corrected for the noise of a finite sample. "
        "Shown is the pooled ratio ||E g||² / tr Cov g over all parameters of a group, which rare features do not disturb. Below "
        "it stand the median over the parameters of live features, and in brackets the quartiles, which are no interval. "
        f"Each arm is measured in contexts as it was trained on.</p>{tables}{details if dead else ''}"
    )


def _gsnr_table(result: Result, unit: str) -> str:
    """Arms by groups of parameters."""
    rows = [row for row in result["gsnr"] if row["unit"] == unit and row["features"] != "dead"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    body = ""
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = {row["group"]: row for row in rows if row["arm"] == arm}
        cells = "".join(
            f'<td class="number">{number(row["pooled"])}<small>{number(row["median"])} {bracket(row["low"], row["high"])}'
            "</small></td>"
            if (row := found.get(group))
            else '<td class="number">n/a</td>'
            for group in groups
        )
        body += f"<tr><td>{arm_name(arm)}</td>{cells}</tr>"
    head = "".join(f'<th class="number"><code>{escape(group)}</code></th>' for group in groups)
    return f'<div class="wide"><table><tr><th>arm</th>{head}</tr>{body}</table></div>'
