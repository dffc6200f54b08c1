"""`steer.html`: what happens when a feature is pushed, and how far one can push, on one self-contained page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from fastsae.evaluate import marks
from fastsae.evaluate.interactive import write_interactive_page
from fastsae.evaluate.metrics import number
from fastsae.interpret.page_data import rounded
from fastsae.steering.order import alphas, is_stable, text_rows
from fastsae.steering.page_sections import dose_section, header, like_kl_section
from fastsae.steering.result import Result, Run, Text
from fastsae.steering.words import MEASURES, run_name, shown

_HERE = Path(__file__).parent
_TEXTS = """
<h2>The texts</h2>
<p>Each token is shaded by its KL: how far the steered model's predictions of it are from the unsteered model's on the same text.
Point at a token, or touch it, to see its KL, alpha, and the feature's own activation before it.
A text that the model did not end itself is cut off at the limit.
<span class="nowrap"><kbd>j</kbd> <kbd>k</kbd> or <kbd>→</kbd> <kbd>←</kbd></span> go to the next and the previous prompt.</p>
<p class="legend shades" aria-label="Shades">KL in nats:</p>
<div id="tabs" class="tabs" role="tablist" aria-label="Prompts"></div>
<div id="panel" role="tabpanel" tabindex="0"><noscript>The texts need JavaScript, which is in the page itself.</noscript></div>
"""


def write_steer_page(path: str | Path, result: Result) -> None:
    """Writes one HTML page that loads nothing from elsewhere, atomically.

    Args:
        path: The file, usually `steer.html`.
        result: As in `steer.json`, see `fastsae.steering.result`. What is undefined reads "n/a".
    """
    versions = ", ".join(f"{escape(name)} {escape(str(version))}" for name, version in result["versions"].items())
    end = f'<p class="note">{number(float(result["seconds"]))} s; {versions}</p>'
    sections = [
        '<main id="main">',
        header(result),
        dose_section(result),
        like_kl_section(result),
        _TEXTS.strip(),
        end,
        "</main>",
    ]
    css, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("steer.css", "steer.js"))
    write_interactive_page(
        path, "fastsae steer", css=f"{marks.CSS}{css}", sections=sections, data=_data(result), script=script
    )


def _data(result: Result) -> dict[str, Any]:
    """What the script shows: prompts, rows of runs (see `text_rows`), and of each run its name and texts."""
    return {
        "prompts": result["prompts"],
        "rows": [{"title": row.title, "runs": row.runs} for row in text_rows(result)],
        "runs": [_packed_run(result, run) for run in result["runs"]],
    }


def _packed_run(result: Result, run: Run) -> dict[str, Any]:
    texts = {text["prompt"]: _packed_text(run, text) for text in run["texts"]}
    return {"name": run_name(run), "holds": is_stable(result, run), "texts": texts}


def _packed_text(run: Run, text: Text) -> dict[str, Any]:
    """Pieces with their numbers, three digits each, and names and values of the measures as they are read."""
    pieces = text["pieces"] or ([text["text"]] if text["text"] else [])
    return {
        "pieces": pieces,
        "kl": [rounded(x) for x in text["kl"]],
        "alphas": [rounded(x) for x in alphas(run, text)],
        "acts": [rounded(x) for x in text["acts"]],
        "measures": [[measure.short, shown(text[measure.key], measure)] for measure in MEASURES],
        "ended": text["ended"],
    }
