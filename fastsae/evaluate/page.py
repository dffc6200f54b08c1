"""`report.html`: what a run or an evaluation found, on one self-contained page."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from fastsae.disk import write_atomically
from fastsae.evaluate import plots
from fastsae.evaluate.gradient_sections import gradient_sections
from fastsae.evaluate.metrics import OTHER_TOKENS, SINKS, number
from fastsae.evaluate.reconstruction import Evaluation
from fastsae.evaluate.style import CSS

# metric, its name, unit, one line of meaning
_HEADLINES = (
    ("fvu", "FVU", "", "Fraction of variance unexplained: 0 is perfect, 1 no better than the mean activation."),
    ("special_fvu", "Special-token FVU", "", "The same on the tokens of the chat template alone."),
    ("l0", "L0", "features per token", "How many features are active on a token, on average."),
    ("mse_log2", "MSE, log2", "", "log2 of the squared error per element, mean over dialogues."),
    ("special_mse_log2", "Special-token MSE, log2", "", "The same on the tokens of the chat template alone."),
    ("dead_share", "Dead features", "%", "Features that fired on no token of the evaluation set."),
    (
        "delta_loss_percent",
        "Delta loss",
        "%",
        "Rise of the model's loss when the reconstruction replaces the activation.",
    ),
    ("recovered", "Loss recovered", "%", "100 is the unchanged model, 0 the one with zeros in this place."),
    ("kl", "KL divergence", "nats per token", "From the model's predictions to those with the reconstruction."),
)
# metric, another one that its card shows beside it, and the words for it
_BESIDE = {
    "mse_log2": ("mse_with_sinks_log2", "{} with attention sinks"),
    "special_mse_log2": ("special_mse_with_sinks_log2", "{} with attention sinks"),
    "l0": ("target_l0", "target: {}"),
}
_PERCENT = {"dead_share": 100.0, "recovered": 100.0}
_MEANINGS = {
    "mse": "squared error per element, mean over the tokens of a dialogue, then over dialogues",
    "mse_log2": "log2 of mse",
    "special_mse": "mse over special tokens only",
    "special_mse_log2": "log2 of special_mse",
    "mse_with_sinks": "mse over all tokens, as the FAST paper counts it",
    "mse_with_sinks_log2": "log2 of mse_with_sinks",
    "special_mse_with_sinks": "special_mse over all special tokens, as the FAST paper counts it",
    "special_mse_with_sinks_log2": "log2 of special_mse_with_sinks",
    "mse_micro": "squared error per element, every token counted the same",
    "special_mse_micro": "mse_micro over special tokens only",
    "fvu": "squared error over squared distance to the mean",
    "special_fvu": "fvu over special tokens only, about the mean of all tokens",
    "explained_variance": "1 − fvu",
    "l0": "active features per token",
    "l0_special": "l0 over special tokens only",
    "target_l0": "the l0 that the run was to reach",
    "l0_missed_percent": "100 (l0 − target_l0) / target_l0",
    "dead_share": "share of features that fired on no token",
    "norm": "mean length of the activations",
    "norm_median": "median length of the first activations; a sink is more than ten times as long",
    "fvu_sinks": "fvu of the attention sinks, about the mean of all other tokens",
    "mse_sinks": "mse_micro of the attention sinks",
    "norm_sinks": "mean length of the attention sinks' activations",
    "sinks": "attention sinks among the tokens evaluated",
    "sinks_beyond_position_0": "attention sinks that are not the first token of a dialogue",
    "tokens_evaluated": "tokens evaluated",
    "dialogues": "dialogues evaluated",
    "ce": "the model's own next-token loss, nats per token",
    "ce_spliced": "the loss with the reconstruction in place of the activation",
    "ce_zero": "the loss with zeros in its place",
    "delta_loss_percent": "100 (ce_spliced − ce) / ce",
    "recovered": "(ce_zero − ce_spliced) / (ce_zero − ce)",
    "kl": "KL divergence of the spliced from the model's own predictions, nats per token",
    "dialogues_dropped": "dialogues that could not be used",
    "tokens_computed": "tokens that the language model computed for training, with padding",
    "padding_share": "share of padding among them",
    "first_tokens_left_out": "tokens left out of training because a context begins with them",
    "sinks_left_out": "attention sinks left out of training because they are too long",
    "seconds": "duration of the run",
    "seconds_of_evaluation": "part of it that the evaluation took, of all SAEs of the run together",
    "seconds_of_evaluation_alone": "part of that which was spent on this SAE alone",
    "model_tokens_per_second": "speed of the language model while training, tokenising included",
    "sae_tokens_per_second": "speed of the training steps alone, of all SAEs of the run together",
}
_HISTOGRAM_BINS = 40


def write_report(
    path: str | Path,
    *,
    config: dict[str, Any],
    metrics: dict[str, Any],
    history: Sequence[dict[str, Any]],
    evaluation: Evaluation | None,
) -> None:
    """Writes one HTML page that loads nothing from elsewhere, atomically.

    Args:
        path: The file, usually `report.html`.
        config: The resolved configuration, shown as JSON.
        metrics: As in `metrics.json`; None reads "n/a". Sentences under `warnings` stand at the top. What could not be
            used of the data (`dropped_by_reason`, `dropped_first_rows`, `unknown_roles`) has a table of its own.
        history: Training log, one row per entry: `tokens`, `loss`, `mse_loss`, `l0`, `fvu`, `dead_share` are drawn, missing
            values are skipped. May be empty, as for an SAE that was only evaluated.
        evaluation: Densities, special tokens and features. None leaves these sections out.
    """
    sections = [_header(config, evaluation), _warnings(metrics), _headlines(metrics), _curves(history)]
    if evaluation is not None:
        sections += [_densities(evaluation), _special_tokens(evaluation), _features(evaluation)]
    sections += [gradient_sections(metrics), _data(metrics), _all_metrics(metrics), _configuration(config)]
    write_page(path, "fastsae report", CSS, sections)


def write_page(path: str | Path, title: str, css: str, sections: Sequence[str], script: str = "") -> None:
    """Writes a page that loads nothing from elsewhere, atomically; a browser runs no other script in it than the given one.

    Args:
        path: The file.
        title: Plain text.
        css: The style sheet.
        sections: HTML; empty ones are left out.
        script: JavaScript that runs behind the last section, without `</script>`. A page without it has no script.
    """
    script = f"\n{script}\n" if script else ""
    allowed = f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}\n</style>\n</head>\n<body>\n{plots.frame_clip()}\n"
        + "\n".join(section for section in sections if section)
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body>\n</html>\n"
    )
    write_atomically(
        Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    )


def _header(config: dict[str, Any], evaluation: Evaluation | None) -> str:
    facts = [f"{label} <code>{escape(str(config[key]))}</code>" for key, label in (("model", "model"), ("layer", "layer"),
             ("hook", "hook"), ("dataset", "data"), ("d_sae", "features")) if config.get(key) is not None]  # fmt: skip
    if evaluation is not None:
        tokens, dialogues = (number(evaluation.metrics.get(name)) for name in ("tokens", "dialogues"))
        facts.append(f"evaluated on {tokens} tokens in {dialogues} dialogues")
    return f'<h1>Sparse autoencoder report</h1>\n<p class="lead">{" · ".join(facts)}</p>'


def _warnings(metrics: dict[str, Any]) -> str:
    sentences = "".join(f"<p>{escape(str(sentence))}</p>" for sentence in metrics.get("warnings") or ())
    return f'<div class="warnings" role="note">{sentences}</div>' if sentences else ""


def _headlines(metrics: dict[str, Any]) -> str:
    cards = []
    for key, name, unit, meaning in _HEADLINES:
        value = metrics.get(key)
        shown = value * _PERCENT[key] if value is not None and key in _PERCENT else value
        small = f" <small>{unit}</small>" if unit and value is not None else ""
        other, words = _BESIDE.get(key, ("", ""))
        beside = ""
        if metrics.get(other) is not None:
            beside = f'<div class="beside">{words.format(number(metrics[other]))}</div>'
        cards.append(
            f'<div class="card"><div class="name">{name}</div><div class="value">{number(shown)}{small}</div>{beside}'
            f'<div class="meaning">{meaning}</div></div>'
        )
    note = ""
    if metrics.get("sinks"):
        note = f'<p class="note">{_sinks(metrics)}</p>'
    return f'<div class="cards">{"".join(cards)}</div>{note}'


def _sinks(metrics: dict[str, Any]) -> str:
    beyond = metrics.get("sinks_beyond_position_0") or 0
    found = f"{number(metrics['sinks'])} tokens are attention sinks and left out unless a figure says otherwise: "
    found += "the first token of each dialogue"
    if beyond:
        found += f", and {number(beyond)} that are more than ten times as long as the median token"
    return found + "."


def _curves(history: Sequence[dict[str, Any]]) -> str:
    def points(key: str, scale: float = 1.0) -> list[plots.Point]:
        rows = [row for row in history if row.get(key) is not None and row.get("tokens") is not None]
        return [(float(row["tokens"]), scale * float(row[key])) for row in rows]

    if not history:
        return ""
    x_label = "training tokens"
    charts = [
        (plots.line_chart({"total": points("loss"), "squared error": points("mse_loss")}, x_label=x_label,
                          y_label="loss per token (log scale)", log=True),
         "Total loss and its squared-error part, in squared activation units of the (normalised) training activations."),
        _from_zero(points("fvu"), x_label, "FVU", "Fraction of variance unexplained, of each training batch."),
        _from_zero(points("l0"), x_label, "L0, features per token", "Active features per token."),
        _from_zero(points("dead_share", 100.0), x_label, "dead features, %", "Share of features that count as dead."),
    ]  # fmt: skip
    figures = [f"<figure>{chart}<figcaption>{caption}</figcaption></figure>" for chart, caption in charts]
    return f'<h2>Training</h2>\n<div class="charts">{"".join(figures)}</div>'


def _from_zero(points: list[plots.Point], x_label: str, y_label: str, caption: str) -> tuple[str, str]:
    """A chart from zero to somewhat above what the second half of training reaches, and its caption."""
    values = [y for _, y in points if math.isfinite(y)]
    top = 3 * max(values[len(values) // 2 :], default=0.0)
    if values and 0 < top < max(values):
        caption += f" Early values, up to {number(max(values))}, lie above the frame."
    else:
        top = max(values, default=1.0)
    return plots.line_chart({y_label: points}, x_label=x_label, y_label=y_label, top=top), caption


def _densities(evaluation: Evaluation) -> str:
    tokens = (evaluation.metrics.get("tokens") or 0) - (evaluation.metrics.get("sinks") or 0)
    counts = evaluation.feature_counts
    n_dead = int((counts == 0).sum())
    if tokens <= 0:
        return ""
    low = float(math.floor(-math.log10(tokens)))
    edges = [low * (1 - i / _HISTOGRAM_BINS) for i in range(_HISTOGRAM_BINS + 1)]
    logs = (counts[counts > 0].double() / tokens).log10()
    bins = ((logs - low) / -low * _HISTOGRAM_BINS).long().clamp(0, _HISTOGRAM_BINS - 1) if low else logs.long()
    heights = bins.bincount(minlength=_HISTOGRAM_BINS).tolist()
    chart = plots.histogram(edges, heights, x_label="log10 of firing frequency (share of tokens)", y_label="features")
    often = int((counts > 0.1 * tokens).sum())
    return (
        "<h2>Feature density</h2>\n"
        f"<p>{number(n_dead)} of {number(len(counts))} features ({number(100 * n_dead / len(counts))} %) never fired on "
        f"{number(int(tokens))} tokens and are not in the histogram. {number(often)} fire on more than a tenth of the "
        f"tokens.</p>\n<figure>{chart}</figure>"
    )


def _special_tokens(evaluation: Evaluation) -> str:
    columns = (("count", "tokens"), ("mse", "MSE"), ("fvu", "FVU"), ("l0", "mean L0"), ("norm", "mean norm"))
    head = "<th>token</th>" + "".join(f'<th class="number">{name}</th>' for _, name in columns)
    body = []
    for row in evaluation.special_tokens:
        name = escape(visible(str(row["token"])))
        if row["token"] not in (OTHER_TOKENS, SINKS):
            name = f"<code>{name}</code>"
        cells = "".join(f'<td class="number">{number(row[key])}</td>' for key, _ in columns)
        body.append(f"<tr><td>{name}</td>{cells}</tr>")
    return (
        "<h2>Special tokens</h2>\n"
        "<p>Tokens that the chat template writes around every turn; a role's name counts there, not inside a message. FVU is "
        "the squared error over the squared distance to the mean of all tokens. Attention sinks, the first token of each "
        "dialogue among them, have their own row and are left out of the others.</p>"
        f'\n\n<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'
    )


def _features(evaluation: Evaluation) -> str:
    title = "<h2>Features of the special tokens</h2>\n"
    if not evaluation.top_special_features:
        return title + "<p>No feature fires on a special token, or the chat template has none.</p>"
    intro = (
        "<p>The features with the largest mean activation over all special tokens, each with the five dialogues where it "
        "is strongest, attention sinks left out. The background shows the activation relative to the feature's largest; "
        "the number on the left is the activation at the outlined token.</p>"
    )
    return title + intro + "".join(_feature(row) for row in evaluation.top_special_features)


def _feature(row: dict[str, Any]) -> str:
    by_token = sorted(row["mean_activation_by_token"].items(), key=lambda item: -(item[1] or 0))
    tokens = ", ".join(f"<code>{escape(visible(token))}</code> {number(value)}" for token, value in by_token if value)
    largest = max((context["max_activation"] for context in row["contexts"]), default=0.0)
    contexts = "".join(_context(context, largest) for context in row["contexts"])
    return (
        f'<div class="feature"><h3>Feature {row["feature"]}</h3>\n'
        f'<p class="note">fires on {_percent(row["share_special"])} of special tokens and {_percent(row["share_other"])} '
        f"of others; mean activation on special tokens {number(row['mean_activation'])}: {tokens}</p>{contexts}</div>\n"
    )


def _context(context: dict[str, Any], largest: float) -> str:
    spans = []
    for i, (token, act) in enumerate(zip(context["tokens"], context["activations"], strict=True)):
        text = escape(visible(token))
        if act > 0 and largest > 0:
            mark = ' class="top"' if i == context["peak"] else ""
            text = f'<span{mark} style="--a:{0.08 + 0.57 * min(1.0, act / largest):.2f}" title="{number(act)}">{text}</span>'
        spans.append(text)
    where = f"dialogue {context['dialogue']}, token {context['position']}"
    return (
        f'<div class="context"><div class="peak" title="{where}">{number(context["max_activation"])}</div>'
        f'<div class="text">{"".join(spans)}</div></div>'
    )


def visible(token: str) -> str:
    """Writes line breaks and tabs as signs, so that a context stays on its lines."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{number(100 * share)} %"


def _data(metrics: dict[str, Any]) -> str:
    """What the run could not use of its data, and the roles in it that it does not know."""
    first_rows = metrics.get("dropped_first_rows", {})
    rows = [
        f"<tr><td>could not be used because {escape(reason)}, such as row {first_rows[reason]}</td>"
        f'<td class="number">{n:,}</td></tr>'
        for reason, n in metrics.get("dropped_by_reason", {}).items()
    ]
    rows += [
        f'<tr><td>have the unknown role <code>{escape(visible(word))}</code></td><td class="number">{n:,}</td></tr>'
        for word, n in metrics.get("unknown_roles", {}).items()
    ]
    if not rows:
        return ""
    head = '<tr><th>dialogues that</th><th class="number">number</th></tr>'
    return f'<h2>Unusual dialogues</h2>\n<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _all_metrics(metrics: dict[str, Any]) -> str:
    # a run reports the tokens it was trained on under `tokens`, an evaluation by itself those it measured
    meanings = _MEANINGS | {"tokens": "tokens trained on" if "tokens_evaluated" in metrics else "tokens evaluated"}
    rows = "".join(
        f'<tr><td><code>{escape(name)}</code></td><td class="number">{number(value, 4)}</td>'
        f"<td>{escape(meanings.get(name, ''))}</td></tr>"
        for name, value in metrics.items()
        if value is None or isinstance(value, (int, float))
    )
    head = '<tr><th>metric</th><th class="number">value</th><th>meaning</th></tr>'
    note = "<p>Attention sinks are left out of every metric of activations whose name does not say otherwise.</p>"
    return f'<h2>All metrics</h2>\n{note}<div class="wide"><table>{head}{rows}</table></div>'


def _configuration(config: dict[str, Any]) -> str:
    text = escape(json.dumps(config, indent=2, default=str, ensure_ascii=False))
    return f"<h2>Configuration</h2>\n<details><summary>The resolved configuration</summary><pre>{text}</pre></details>"
