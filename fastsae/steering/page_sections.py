"""The sections of `steer.html` above the texts: what was steered, how far one can push, and doses at like KL."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fastsae.evaluate import marks
from fastsae.evaluate.metrics import number
from fastsae.steering.charts import Level, Series, chart
from fastsae.steering.order import Alike, alike, alphas, groups, ratio, unsteered_of
from fastsae.steering.result import ChosenFeature, Result, Run
from fastsae.steering.words import (
    ARMS,
    DOSES,
    HOLDS,
    MEASURES,
    NOT_STEERED,
    POSITIONS,
    PROMPTED,
    UNDEFINED,
    Measure,
    alpha_words,
    dose_words,
    group_name,
    mode_sentence,
    plain,
    run_name,
    shown,
    stable_ends,
    stable_sentence,
)

_WINDOWS = 16  # in which the length of the texts is cut at most, for the charts over it
_LIKE = 1.25  # ratio of two mean KLs up to which they count as alike


def header(result: Result) -> str:
    """Title, what was steered and how, and how the features and alpha were chosen."""
    names = ", ".join(str(chosen["feature"]) for chosen in result["features"])
    plural = "s" if len(result["features"]) > 1 else ""
    at = result["positions"]
    facts = [
        f"model <code>{escape(result['model'])}</code>",
        f"SAE <code>{escape(result['sae'])}</code> ({escape(result['architecture'])})",
        f"layer {result['layer']} <code>{escape(result['hook'])}</code>",
        f"mode {escape(result['mode'].replace('_', '-'))}",
        f"at {escape(POSITIONS.get(at, at))}",
        f"at most {number(result['max_new_tokens'])} new tokens",
        "greedy" if not result["temperature"] else f"temperature {plain(result['temperature'])}, seed {result['seed']}",
    ]
    chosen = "".join(f"<li>{_chosen(one)}</li>" for one in result["features"])
    title = f"Steering feature{plural} {escape(names)}" if names else "Steering"
    return (
        f'<button id="theme" type="button">Dark</button>\n<h1>{title}</h1>\n<p class="lead">{" · ".join(facts)}</p>\n'
        f'<ul class="chosen">{chosen}{_auto(result)}</ul>'
    )


def _chosen(one: ChosenFeature) -> str:
    score = "" if one["score"] is None else f", score {number(float(one['score']))}"
    maximum = "" if one["maximum"] is None else f"; its largest activation seen is {number(float(one['maximum']))}"
    return f"Feature {one['feature']}: {escape(one['chosen_by'])}{score}{maximum}"


def _auto(result: Result) -> str:
    auto = result["auto"]
    if auto is None:
        return ""
    tried = ", ".join(f"{plain(one['alpha'])} ({number(float(one['p95_kl']))})" for one in auto["tried"])
    return (
        f"<li>Alpha auto found {plain(auto['alpha'])}, where the p95 KL is {number(float(auto['p95_kl']))} nats; it looks for "
        f"1 nat. <details><summary>The strengths that were tried</summary><p>alpha (p95 KL): {tried}</p></details></li>"
    )


def dose_section(result: Result) -> str:
    """The stable ranges in words, each measure against alpha, and all of them in a table."""
    found = groups(result["runs"])
    names = [name for name, (run, *_) in found.items() if run["dose"] == "fixed" and run["arm"] not in NOT_STEERED]
    index = {name: i for i, name in enumerate(names)}
    sentences = "".join(f"<li>{escape(stable_sentence(row))}</li>" for row in result["stable"])
    figures = "".join(_figure(result, measure, index) for measure in MEASURES)
    rows = [(run_name(run), run) for runs in found.values() for run in runs]
    return (
        f"<h2>How far one can push</h2>\n<p>{escape(mode_sentence(result))} {escape(_arms(result))}</p>"
        f"<p>{escape(HOLDS)}</p><ul>{sentences}</ul>{_legend(result, index)}"
        f'<div class="charts">{figures}</div>'
        f"<details><summary>All figures in a table</summary>{_table(rows)}</details>"
    )


def _arms(result: Result) -> str:
    present = {run["arm"] for run in result["runs"]}
    said = "; ".join(f"“{arm}” is {meaning}" for arm, meaning in ARMS.items() if arm in present)
    instruction = result.get("instruction")
    asked = f": {instruction.strip().rstrip('.')}" if instruction and PROMPTED in present else ""
    return f"Beside the feature, {said}{asked}." if said else ""


def _legend(result: Result, index: dict[str, int]) -> str:
    lines = "".join(
        f'<span><svg class="mark long" viewBox="0 -6 24 12" aria-hidden="true"><path class="level {arm}" d="M0 0H24"/></svg>'
        f"{name}</span>"
        for arm, name in (("unsteered", "the unsteered text"), ("prompted", "the prompted baseline"))
        if any(run["arm"] == arm for run in result["runs"])
    )
    shaded = _shaded(result)
    if shaded is not None:
        name, (low, high) = shaded
        lines += (
            '<span><svg class="mark" viewBox="-6 -6 12 12" aria-hidden="true"><path class="stable" d="M-6 -6H6V6H-6z"/></svg>'
            f"the texts of {escape(name)} hold: alpha {plain(low)} to {plain(high)}</span>"
        )
    return marks.legend(index, lines)


def _shaded(result: Result) -> tuple[str, tuple[float, float]] | None:
    """Name and ends of the range that charts shade: that of the feature at a fixed dose."""
    for row in result["stable"]:
        ends = stable_ends(row)
        if row["arm"].startswith("feature") and row["dose"] == "fixed" and ends is not None:
            return group_name(row), ends
    return None


def _figure(result: Result, measure: Measure, index: dict[str, int]) -> str:
    levels = [
        Level(f"{run['arm']}: {shown(run[measure.key], measure)}", run["arm"], measure.factor * value)
        for run in result["runs"]
        if run["arm"] in NOT_STEERED and (value := run[measure.key])
    ]
    shaded = _shaded(result)
    drawn = chart(
        [Series(i, name, _points(result, name, measure)) for name, i in index.items()],
        x_label=alpha_words(result),
        y_label=f"{measure.name}, {measure.unit}" if measure.unit else f"{measure.name} (log scale)",
        log=measure.key == "perplexity",
        levels=levels,
        stable=shaded and shaded[1],
    )
    return f"<figure>{drawn}<figcaption>{escape(measure.meaning)} {_stands(result, measure)}</figcaption></figure>"


def _points(result: Result, name: str, measure: Measure) -> list[tuple[float, float]]:
    """Alpha and measure of a group's runs; in mode "add" alpha 0 is the unsteered text."""
    runs = groups(result["runs"])[name]
    unsteered = unsteered_of(result)
    if unsteered and result["mode"] == "add" and all(run["alpha"] for run in runs):
        runs = sorted([*runs, {**unsteered, "alpha": 0.0}], key=lambda run: run["alpha"])
    return [(run["alpha"], measure.factor * value) for run in runs if (value := run[measure.key]) is not None]


def _stands(result: Result, measure: Measure) -> str:
    """Where the texts stand that are not steered."""
    said = {run["arm"]: shown(run[measure.key], measure) for run in result["runs"] if run["arm"] in NOT_STEERED}
    said = {arm: value for arm, value in said.items() if value != UNDEFINED}
    parts = [f"the unsteered text stands at {value}" for arm, value in said.items() if arm != PROMPTED]
    parts += [f"the prompted baseline at {said[PROMPTED]}"] if PROMPTED in said else []
    sentence = ", ".join(parts)
    return escape(f"{sentence[:1].upper()}{sentence[1:]}.") if sentence else ""


def _table(rows: Sequence[tuple[str, Run]]) -> str:
    head = "".join(f'<th class="number">{m.name}{f"<small>{m.unit}</small>" if m.unit else ""}</th>' for m in MEASURES)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="number">{shown(run[measure.key], measure, unit=False)}</td>' for measure in MEASURES)
        + "</tr>"
        for name, run in rows
    )
    return f'<div class="wide"><table><tr><th>texts</th>{head}</tr>{body}</table></div>'


def like_kl_section(result: Result) -> str:
    """Fixed and dynamic doses at like mean KL: their measures, and their KL and strength over the length of the texts."""
    found = alike(result)
    if not found:
        return ""
    used = dict.fromkeys(run["dose"] for one in found for run in (one.fixed, *one.dynamic))
    meanings = "; ".join(f"<strong>{dose_words(dose)}</strong>, {DOSES.get(dose, '')}" for dose in used)
    return (
        "<h2>Fixed and dynamic strength at like KL</h2>\n"
        f"<p>A strength can change from token to token: {meanings}. Doses can be compared where they cost the same: beside "
        "each dynamic dose stands the fixed dose whose mean KL is nearest. What then counts is how much their texts repeat, and "
        f"whether the KL rises towards the end.</p>{''.join(_alike(result, one) for one in found)}"
    )


def _alike(result: Result, one: Alike) -> str:
    runs = [one.fixed, *one.dynamic]
    far = [run for run in one.dynamic if ratio(one.fixed, run) > _LIKE]
    warning = "".join(
        f'<p class="higher">{escape(run_name(run))} is not at like KL: no fixed dose of the grid comes closer than '
        f"{number(ratio(one.fixed, run))} times.</p>"
        for run in far
    )
    index = {run_name(run): i for i, run in enumerate(runs)}
    longest = max((len(text["kl"]) for run in runs for text in run["texts"]), default=0)
    size = max(1, -(-longest // _WINDOWS))
    kl, push = [], []
    for i, run in enumerate(runs):
        kl.append(Series(i, run_name(run), over_length([text["kl"] for text in run["texts"]], size), False))
        pushes = [alphas(run, text) for text in run["texts"]]
        push.append(Series(i, run_name(run), over_length(pushes, size), False))
    kl_chart = chart(kl, x_label="new tokens", y_label="KL, nats per token")
    push_chart = chart(push, x_label="new tokens", y_label=alpha_words(result))
    at_a_time = f", {size} tokens at a time" if size > 1 else ""
    caption = f"Means over the texts that are that long{at_a_time}."
    table = _table([(run_name(run), run) for run in runs])
    return (
        f"<h3>Like {escape(run_name(one.fixed))}</h3>{warning}{table}{marks.legend(index)}"
        f'<div class="charts"><figure>{kl_chart}<figcaption>{caption}</figcaption></figure><figure>{push_chart}</figure></div>'
    )


def over_length(texts: Sequence[Sequence[float]], size: int) -> list[tuple[float, float]]:
    """The middle of each window of `size` tokens, counted from 1, and the mean over all texts' tokens in it."""
    longest = max(map(len, texts), default=0)
    points = []
    for start in range(0, longest, size):
        values = [value for text in texts for value in text[start : start + size]]
        last = min(start + size, longest)
        points.append(((start + 1 + last) / 2, sum(values) / len(values)))
    return points
