"""`features.html`: what features mean and where they fire, on one self-contained page that a browser opens from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsae.evaluate.interactive import write_interactive_page
from fastsae.interpret.page_data import PageFeature, pack_features

_HERE = Path(__file__).parent
_SCRIPTS = ("features.js", "feature.js")
_BAR = """
<header class="bar-top">
<label class="hidden-label" for="search">Search features</label>
<input id="search" type="search" placeholder="Search explanation, token or number" autocomplete="off" spellcheck="false">
<label class="hidden-label" for="order">Order of features</label>
<select id="order"></select>
<button id="theme" type="button">Dark</button>
</header>
<main id="main"><noscript>This page needs JavaScript, which is in the page itself.</noscript></main>
<p class="note keys"><kbd>j</kbd> <kbd>k</kbd> next and previous · <kbd>/</kbd> search · <kbd>Esc</kbd> all features</p>
"""


@dataclass(frozen=True)
class PageHeader:
    """What stands above the list of features.

    Attributes:
        title: Such as `Features of smollm2, layer 15`.
        facts: Names and values, such as `("model", "SmolLM2-135M-Instruct")`.
        warnings: Sentences that a reader has to know first.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()


def write_features_page(
    path: str | Path, header: PageHeader, features: Sequence[PageFeature], token_text: Callable[[int], str]
) -> None:
    """Writes one HTML page that loads nothing from elsewhere, atomically.

    Args:
        path: The file, usually `features.html`.
        header: Title and facts.
        features: About 200 make a page of 2 MB; they are listed by their number at first.
        token_text: Text of a token id, such as `lambda token: tokenizer.decode([token])`.
    """
    facts = {"title": header.title, "facts": [list(fact) for fact in header.facts], "warnings": list(header.warnings)}
    data = {"header": facts, **pack_features(features, token_text)}
    css = (_HERE / "features.css").read_text(encoding="utf-8")
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    write_interactive_page(path, header.title, css=css, sections=[_BAR.strip()], data=data, script=script)
