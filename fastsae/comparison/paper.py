"""The figures that the FAST paper gives, each with its definition, for the page to set beside ours.

Source: arXiv:2506.07691v1 (tables 3 to 9 and section 5), and the abstract of the version for ICML 2026. Values that the paper
prints as log2 are called so here; it prints them as plain "MSE" in places.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from fastsae.comparison.cells import arm_name, bracket, class_name, value_of
from fastsae.comparison.result import Difference, Result
from fastsae.evaluate.metrics import number
from fastsae.evaluate.statistics import sample_size_of_shares, wilson


class PaperFigure(NamedTuple):
    """One figure of the paper.

    Attributes:
        name: What it is called.
        definition: How it is computed, as far as the paper says.
        paper: Its values, for BT(P) / BT(F) / FAST unless it says otherwise.
        ours: Class of tokens and metric that are computed in the same way; None where a comparison does not measure it.
        is_ratio: It is how many times as large as FAST's the MSE of BT(P) and of BT(F) is.
    """

    name: str
    definition: str
    paper: str
    ours: tuple[str, str] | None
    is_ratio: bool = False


def _percents(count: int) -> str:
    """Wilson's interval of so many of the 128 features that the paper's judge saw."""
    interval = wilson(count, 128)
    assert interval is not None
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


_MACRO = "squared error per element, mean over the tokens of a dialogue, then over dialogues (eq. 7)"
_SAE = "Qwen2.5-7B-Instruct, layer 18, 8X"
_CELLS = "computed from its tables 3 to 9: the median over 40 cells of model, layer and width"
FIGURES = (
    PaperFigure(
        "special-token MSE, log2, Standard SAE",
        f"{_MACRO}, over special tokens, position 0 among them; {_SAE}. The abstract prints these values as plain MSE",
        "5.1985 / 1.5093 / 0.6468, which are 36.7 / 2.85 / 1.57 in plain MSE",
        ("special_with_sinks", "mse_log2"),
    ),
    PaperFigure(
        "MSE, log2, Standard SAE",
        f"{_MACRO}, over all tokens; {_SAE}",
        "2.0024 / 1.4749 / 1.3892, which are 4.01 / 2.78 / 2.62 in plain MSE",
        ("all_with_sinks", "mse_log2"),
    ),
    PaperFigure(
        "special-token MSE, log2, JumpReLU SAE",
        f"as above; {_SAE}; at a sparsity that is not given",
        "−4.0005 / −8.0743 / −9.7604",
        ("special_with_sinks", "mse_log2"),
    ),
    PaperFigure(
        "MSE, log2, JumpReLU SAE",
        f"as above; {_SAE}; at a sparsity that is not given",
        "−6.5926 / −6.8466 / −9.1659",
        ("all_with_sinks", "mse_log2"),
    ),
    PaperFigure(
        "ratio of MSE to FAST's",
        f"BT(P) and BT(F); {_CELLS}",
        "Standard 1.23 and 1.02 times; JumpReLU 10.5 and 2.47 times",
        ("all_with_sinks", "mse_log2"),
        is_ratio=True,
    ),
    PaperFigure(
        "ratio of special-token MSE to FAST's",
        f"BT(P) and BT(F); {_CELLS}",
        "Standard 8.35 and 2.00 times; JumpReLU 263 and 72.9 times",
        ("special_with_sinks", "mse_log2"),
        is_ratio=True,
    ),
    PaperFigure(
        "Delta Loss",
        "not defined in the abstract, which alone was read; here 100 (CE spliced − CE) / CE",
        "−0.51 % to +0.37 %, FAST",
        ("all", "delta_loss_percent"),
    ),
    PaperFigure("L0", "active features per token", "not given", ("all", "l0")),
    PaperFigure(
        "dead features", "share of features that fire on no held-out token", "not given", ("features", "dead_share")
    ),
    PaperFigure(
        "features that a judge scores 4 or 5",
        "share of 128 features, Llama-3.2-3B-Instruct, 8X, judged by GPT-4o on a scale of 1 to 5; no interval is given, "
        f"Wilson's are {_percents(9)}, {_percents(13)} and {_percents(27)}; "
        f"{sample_size_of_shares(13 / 128, 27 / 128)} features of each SAE would tell BT(F) from FAST in 80 % of such samples",
        "7.0 / 10.2 / 21.1 %",
        None,
    ),
    PaperFigure(
        "GSNR",
        "gradient signal-to-noise ratio, not defined in the abstract; here (E g)^2 / Var g of each parameter",
        "said to be higher for FAST, without a figure",
        None,
    ),
)


def section(result: Result) -> str:
    """The paper's figures beside those of a comparison, as HTML."""
    body = "".join(
        f'<tr><td>{escape(f.name)}</td><td class="sentence">{escape(f.definition)}</td>'
        f'<td class="sentence">{escape(f.paper)}</td><td class="sentence">{_ours(result, f)}</td></tr>'
        for f in FIGURES
    )
    return (
        "<h2>The paper's figures beside ours</h2>\n<p>The paper (arXiv:2506.07691) trains on blocks of plain text, BT(P), on "
        "blocks of dialogues, BT(F), and on whole dialogues, FAST. It has other models, trains on 40.96 million tokens, "
        "gives no L0 and no intervals, and has one seed. So the columns share definitions, and not conditions.</p>"
        '<div class="wide"><table><tr><th>figure</th><th>definition</th><th>paper: BT(P) / BT(F) / FAST</th>'
        f"<th>ours, {escape(result['architecture'])}: bt-p / bt-f / fast</th></tr>{body}</table></div>"
    )


def _ours(result: Result, figure: PaperFigure) -> str:
    if figure.ours is None:
        return "see above" if figure.name == "GSNR" and result["gsnr"] else "not measured"
    token_class, metric = figure.ours
    if figure.is_ratio:
        ratios = [_ratio_to_fast(row) for row in result["differences"] if (row["class"], row["metric"]) == figure.ours]
        return "; ".join(filter(None, ratios)) or "not measured"
    values = [value_of(result, token_class, metric, arm) for arm in ("bt-p", "bt-f", "fast")]
    if not any(values):
        return "not measured"
    said = " / ".join(number(value["value"], 4) if value else "n/a" for value in values)
    return f"{said}<small>{escape(metric)}, {class_name(token_class)}</small>"


def _ratio_to_fast(row: Difference) -> str:
    """How many times as large as FAST's the MSE of block training is, from the difference of the logs."""
    if row["reference"] != "fast" or row["arm"] not in ("bt-p", "bt-f"):
        return ""
    low, high = (None if end is None else 2.0**end for end in (row["low"], row["high"]))
    return f"{arm_name(row['arm'])} {number(2.0 ** row['difference'])} times {bracket(low, high)}"
