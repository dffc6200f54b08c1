"""`compare.html`: what a comparison found, on one self-contained page, each figure beside its definition."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from fastsae.comparison import charts, paper
from fastsae.comparison.cells import arm_name, bracket, class_name, each_seed, signed, value_cell, value_of
from fastsae.comparison.gradient_sections import gsnr_section, leakage_section
from fastsae.comparison.metrics import METRICS
from fastsae.comparison.result import Arm, Difference, Result
from fastsae.evaluate.dialogues import CLASSES
from fastsae.evaluate.marks import legend, mark
from fastsae.evaluate.metrics import number
from fastsae.evaluate.page import write_page
from fastsae.evaluate.statistics import HIGHER, LOWER

# class and metric of the columns of the table of arms, the name, and the factor to what is shown
_COLUMNS = (
    ("all", "fvu", "FVU", 1.0),
    ("special", "fvu", "FVU, special", 1.0),
    ("all", "mse_log2", "MSE, log2", 1.0),
    ("special", "mse_log2", "MSE, log2, special", 1.0),
    ("all", "delta_loss_percent", "delta loss, %", 1.0),
    ("all", "recovered", "recovered, %", 100.0),
    ("all", "kl", "KL, nats", 1.0),
    ("features", "dead_share", "dead, %", 100.0),
)
# metric, its name, and what its differences are
_FORESTS = (
    ("fvu", "FVU", "difference of the fraction of variance unexplained"),
    ("mse_log2", "MSE, log2", "difference of log2 of the MSE: −1 is half of the error, +1 is twice"),
    ("delta_loss_percent", "Delta loss", "difference in percent of the model's own loss"),
    ("kl", "KL divergence", "difference in nats per token"),
    ("dead_share", "Dead features", "difference of the share of features"),
    ("l0", "L0 (set, not tested)", "difference in active features per token"),
)
_STYLES = {LOWER: "lower", HIGHER: "higher"}
_LARGEST_DEVIATION = 2.0  # percent of the target L0 up to which arms count as matched
_STATISTICS = (
    "<p>Square brackets hold 95 % intervals by the paired bootstrap over the held-out dialogues: the same dialogues are drawn "
    "for all arms, and the seeds of an arm are averaged. They cover which dialogues were held out. They do not cover "
    "training: how much another seed changes a figure is what the values of the seeds show. p-values come from a sign-flip "
    "test over dialogues and are corrected by Holm over all differences on this page that were tested; intervals are not "
    "corrected. A difference is called lower or higher only where its interval leaves out 0, Holm rejects at 5 %, "
    "and the seeds of the two arms do not overlap.</p>"
)


def write_compare_page(path: str | Path, result: Result) -> None:
    """Writes one HTML page that loads nothing from elsewhere, atomically.

    Args:
        path: The file, usually `compare.html`.
        result: As in `compare.json`, see `fastsae.comparison.result`. What was not measured is said to be so, and an arm that
            failed stands in the table with its error.
    """
    sections = [
        _header(result),
        _warnings(result["warnings"]),
        _verdicts(result),
        _arms(result),
        _forests(result),
        _classes(result),
        _sparsity(result),
        leakage_section(result),
        gsnr_section(result),
        _controls(result),
        paper.section(result),
        _definitions(),
        _configuration(result),
    ]
    write_page(path, "fastsae compare", charts.CSS, sections)


def _header(result: Result) -> str:
    held_out = result["held_out"]
    facts = [
        f"model <code>{escape(result['model'])}</code>",
        f"layer <code>{result['layer']}</code>",
        f"data <code>{escape(result['dataset'])}</code>",
        f"{escape(result['architecture'])} with {number(result['d_sae'])} features",
        f"seeds {', '.join(map(str, result['seeds']))}",
        f"measured on {number(held_out['tokens'])} tokens in {number(held_out['dialogues'])} held-out dialogues, "
        f"{number(held_out['sinks'])} of them attention sinks",
    ]
    if result["text_dataset"]:
        facts.insert(3, f"plain text <code>{escape(result['text_dataset'])}</code>")
    return f'<h1>Whole dialogues against blocks</h1>\n<p class="lead">{" · ".join(facts)}</p>'


def _warnings(texts: Sequence[str]) -> str:
    sentences = "".join(f"<p>{escape(text)}</p>" for text in texts)
    return f'<div class="warnings" role="note">{sentences}</div>' if sentences else ""


def _verdicts(result: Result) -> str:
    """A table of all tested differences: a row for each metric, a column for each pair."""
    tested = [row for row in result["differences"] if row["verdict"] is not None]
    pairs = list(dict.fromkeys((row["arm"], row["reference"]) for row in tested))
    if not pairs:
        return "<h2>What differs</h2>\n<p>No two arms could be compared.</p>"
    head = "".join(
        f"<th>{arm_name(arm)}<small>against {arm_name(reference)}</small>{_two_l0(result, arm, reference)}</th>"
        for arm, reference in pairs
    )
    body = ""
    for key in dict.fromkeys((row["class"], row["metric"]) for row in tested):
        found = {(row["arm"], row["reference"]): row for row in tested if (row["class"], row["metric"]) == key}
        cells = "".join(_verdict_cell(found.get(pair)) for pair in pairs)
        body += f"<tr><td><code>{escape(key[1])}</code><small>{class_name(key[0])}</small></td>{cells}</tr>"
    note = ""
    if len(result["seeds"]) < 2:
        note = "<p>There is one seed, so nothing here says how much another seed would change.</p>"
    return (
        f"<h2>What differs</h2>\n{_STATISTICS}{note}<p>Lower is better for every metric in this table. Below the verdict stand "
        "the difference of the means over seeds and its interval. Where the L0 of two arms is marked, they are not at matched "
        "sparsity, and a verdict may say no more than that.</p>"
        f'<div class="wide"><table><tr><th>metric</th>{head}</tr>{body}</table></div>'
    )


def _two_l0(result: Result, arm: str, reference: str) -> str:
    """L0 of both arms on the held-out dialogues, marked where they do not match."""
    values = [value_of(result, "all", "l0", name) for name in (arm, reference)]
    l0, other = (value["value"] if value else None for value in values)
    is_off = bool(l0 and other) and 100 * abs((l0 or 0.0) / (other or 1.0) - 1) > _LARGEST_DEVIATION
    style = ' class="higher"' if is_off else ""
    return f"<small{style}>L0 {number(l0)} against {number(other)}</small>"


def _verdict_cell(row: Difference | None) -> str:
    if row is None:
        return '<td class="not-shown">not comparable</td>'
    style = _STYLES.get(row["verdict"] or "", "not-shown")
    said = f"<small>{signed(row['difference'])}</small><small>{bracket(row['low'], row['high'])}</small>"
    reason = f"<small>{escape(row['reason'])}</small>" if row["reason"] else ""
    return f'<td><span class="{style}">{escape(row["verdict"] or "")}</span>{said}{reason}</td>'


def _arms(result: Result) -> str:
    head = '<th>arm</th><th class="number">L0, own data</th><th class="number">L0, held out</th>'
    head += "".join(f'<th class="number">{name}</th>' for _, _, name, _ in _COLUMNS)
    body = "".join(_arm_row(result, i, arm) for i, arm in enumerate(result["arms"]))
    return (
        "<h2>Arms</h2>\n<p>Every metric follows sparsity, so L0, the mean number of active features of a token, stands in every "
        "row. Beside it stands how far it is from its target: on the data that the arm was trained on, at the end of "
        f"training, and on the held-out dialogues. More than {_LARGEST_DEVIATION:g} % is marked: figures of such an arm are "
        "not at matched sparsity. Below each mean stand its interval and the value of each seed.</p>"
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    )


def _arm_row(result: Result, i: int, arm: Arm) -> str:
    seeds = ", ".join(str(run["seed"]) for run in arm["runs"])
    target = arm["target_l0"]
    about = f"<small>{'control, ' if arm['is_control'] else ''}{f'seeds {seeds}' if seeds else 'no SAE'}</small>"
    about += f"<small>target L0: {'none' if target is None else number(target)}</small>"
    name = f'<td class="arm">{mark(i)}{arm_name(arm["name"])}{about}</td>'
    error = escape(arm["error"] or "")
    if not arm["runs"]:
        return f'<tr>{name}<td class="sentence" colspan="{2 + len(_COLUMNS)}">failed: {error}</td></tr>'
    own = [run["l0_own_data"] for run in arm["runs"]]
    known = [l0 for l0 in own if l0 is not None]
    cells = _l0_cell(sum(known) / len(known) if known else None, known, target)
    held_out = value_of(result, "all", "l0", arm["name"])
    cells += _l0_cell(held_out["value"] if held_out else None, held_out["seeds"] if held_out else [], target)
    cells += "".join(
        value_cell(value_of(result, token_class, metric, arm["name"]), factor)
        for token_class, metric, _, factor in _COLUMNS
    )
    row = f"<tr>{name}{cells}</tr>"
    if error:
        row += f'<tr><td></td><td class="sentence" colspan="{2 + len(_COLUMNS)}">a seed failed: {error}</td></tr>'
    return row


def _l0_cell(l0: float | None, seeds: Sequence[float], target: float | None) -> str:
    if l0 is None:
        return '<td class="number">n/a</td>'
    deviation = ""
    if target:
        off = 100 * (l0 - target) / target
        style = ' class="higher"' if abs(off) > _LARGEST_DEVIATION else ""
        deviation = f"<small{style}>{signed(off, 2)} %</small>"
    return f'<td class="number">{number(l0)}{deviation}<small>{each_seed(seeds)}</small></td>'


def _forests(result: Result) -> str:
    parts = [
        "<h2>Paired differences</h2>\n<p>Each row is one arm minus another on the same held-out dialogues, so that "
        "left of the line the first arm is lower. The mark is the first arm's, the bar the 95 % interval. "
        "Behind it: the difference, its interval, p after Holm, the verdict or what stands against one, and the smallest "
        "difference that the test would have found in 80 % of such sets of dialogues, counted at the level of Holm's "
        "first step.</p>"
    ]
    for metric, title, label in _FORESTS:
        rows = [row for row in result["differences"] if row["metric"] == metric]
        if rows:
            parts.append(f"<h3>{title}</h3>{charts.intervals(list(_forest_rows(rows, _index(result))), label)}")
    return "".join(parts) if len(parts) > 1 else ""


def _forest_rows(rows: Sequence[Difference], index: dict[str, int]) -> Iterator[charts.Row]:
    token_class = ""
    for row in rows:
        is_first, token_class = row["class"] != token_class, row["class"]
        label = f"{arm_name(row['arm'])} − {arm_name(row['reference'])}"
        if is_first:
            label = f"<strong>{class_name(token_class)}</strong>{label}"
        said = f"{signed(row['difference'])} {bracket(row['low'], row['high'])}"
        small = []
        if row["p_holm"] is not None:
            p = row["p_holm"]
            small.append("p &lt; 0.0001" if p < 1e-4 else f"p = {number(p, 2)}")
        small.append(escape(row["reason"] or row["verdict"] or "not tested"))
        if row["detectable"] is not None:
            small.append(f"detectable {number(row['detectable'], 2)}")
        said += f"<small>{'; '.join(small)}</small>"
        yield charts.Row(label, row["low"], row["difference"], row["high"], said, index.get(row["arm"], 0), is_first)


def _classes(result: Result) -> str:
    arms = [arm["name"] for arm in result["arms"] if arm["runs"]]
    body = ""
    for token_class in CLASSES:
        cells = ""
        for arm in arms:
            plain, log = (value_of(result, token_class, metric, arm) for metric in ("mse", "mse_log2"))
            small = f"<small>{number(plain['value'])}</small>" if plain else ""
            cells += f'<td class="number">{number(log["value"] if log else None)}{small}</td>'
        body += f"<tr><td>{class_name(token_class)}</td>{cells}</tr>"
    if not arms:
        return ""
    head = "".join(f'<th class="number">{arm_name(arm)}</th>' for arm in arms)
    with_sinks = [name for name in CLASSES if "sinks" in name or name == "position_0"]
    index = _of_this_model(result)
    drawn = "".join(
        _class_lanes(result, index, names) for names in ([n for n in CLASSES if n not in with_sinks], with_sinks)
    )
    return (
        "<h2>MSE by class of tokens</h2>\n<p>The paper's MSE: squared error per element, mean over the tokens of the class in "
        "a dialogue, then over the dialogues that have any. Attention sinks are left out but where the class says otherwise, "
        "and what holds them has an axis of its own. Classes are defined at the end of the page. Arms on another model's "
        "activations are in the table alone, as their scale is another one.</p>"
        f"{legend(index)}{drawn}<p>log2 of the MSE, and below it the MSE itself:</p>"
        f'<div class="wide"><table><tr><th>class</th>{head}</tr>{body}</table></div>'
    )


def _class_lanes(result: Result, index: dict[str, int], classes: Sequence[str]) -> str:
    groups = []
    for token_class in classes:
        lanes = []
        for arm, i in index.items():
            value = value_of(result, token_class, "mse_log2", arm)
            if value is not None:
                title = f"{arm}: {number(value['value'])} {bracket(value['low'], value['high'])}"
                lanes.append((i, title, value["low"], value["value"], value["high"]))
        if lanes:
            groups.append((class_name(token_class), lanes))
    return charts.lanes(groups, "log2 of the MSE, with 95 % intervals") if groups else ""


def _sparsity(result: Result) -> str:
    points: list[tuple[int, str, float, float]] = []
    index = _of_this_model(result)
    for arm, i in index.items():
        l0, mse = (value_of(result, "all", metric, arm) for metric in ("l0", "mse"))
        if l0 and mse:
            runs = zip(result["arms"][i]["runs"], l0["seeds"], mse["seeds"], strict=True)
            points += [(i, f"{arm}, seed {run['seed']}", x, y) for run, x, y in runs if y > 0]
    targets = {arm["target_l0"] for arm in result["arms"]} - {None}
    target = targets.pop() if len(targets) == 1 else None
    chart = charts.scatter(points, target, "L0, features per token", "MSE per element (log scale)")
    return (
        "<h2>L0 against MSE</h2>\n<p>Each mark is one SAE on the held-out dialogues, attention sinks left out. Of two SAEs, "
        "only one that lies lower at the same L0 reconstructs better. The dashed line is the target.</p>"
        f"{legend(index)}<figure>{chart}</figure>"
    )


def _controls(result: Result) -> str:
    controls = [arm for arm in result["arms"] if arm["is_control"]]
    if not controls:
        return ""
    rows = "".join(
        f'<tr><td>{arm_name(arm["name"])}</td><td class="sentence">{escape(arm["description"])}</td>'
        f"{value_cell(value_of(result, 'all', 'l0', arm['name']))}{value_cell(value_of(result, 'all', 'fvu', arm['name']))}</tr>"
        for arm in controls
    )
    return (
        "<h2>Controls</h2>\n<p>Each control leaves out what an SAE is thought to learn. A figure on which a control does as well "
        "as an arm says nothing about what that arm has learnt.</p>"
        '<div class="wide"><table><tr><th>control</th><th>what it is</th><th class="number">L0</th><th class="number">FVU</th>'
        f"</tr>{rows}</table></div>"
    )


def _definitions() -> str:
    metrics = "".join(
        f"<tr><td><code>{name}</code></td><td>{escape(m.formula)}</td></tr>" for name, m in METRICS.items()
    )
    classes = "".join(
        f"<tr><td>{class_name(name)}</td><td>{escape(meaning)}</td></tr>" for name, meaning in CLASSES.items()
    )
    return (
        "<h2>Definitions</h2>\n<p>Sums run over the held-out dialogues; i counts them. squared_error is ||x̂ − x||² "
        "over the tokens of the class; variance is ||x − m||², m being the mean of all tokens but the sinks. ce is "
        "the model's next-token loss, ce_spliced the same with the reconstruction in place of the activation, "
        "ce_zero with zeros there; sinks keep their own activation in both. A loss belongs to the class of the token "
        "that is predicted. Dead features fire on no held-out token; their intervals are Wilson's and Newcombe's, "
        "which take features for independent draws.</p>"
        f'<div class="wide"><table><tr><th>metric</th><th>formula</th></tr>{metrics}</table>'
        f"<table><tr><th>class</th><th>tokens</th></tr>{classes}</table></div>"
    )


def _configuration(result: Result) -> str:
    text = escape(json.dumps(result["config"], indent=2, default=str, ensure_ascii=False))
    arms = "".join(f"<li>{arm_name(arm['name'])}: {escape(arm['description'])}</li>" for arm in result["arms"])
    return (
        f"<h2>Configuration</h2>\n<ul>{arms}</ul><p>fastsae {escape(result['version'])}; the comparison took "
        f"{number(result['seconds'])} s.</p><details><summary>The resolved configuration</summary><pre>{text}</pre></details>"
    )


def _of_this_model(result: Result) -> dict[str, int]:
    """Name to index of the arms that have an SAE on the model's own activations."""
    arms = enumerate(result["arms"])
    return {arm["name"]: i for i, arm in arms if arm["runs"] and not arm["is_another_model"]}


def _index(result: Result) -> dict[str, int]:
    """Name of an arm to the number that gives it its mark."""
    return {arm["name"]: i for i, arm in enumerate(result["arms"])}
