"""Marks of what a page compares: each has a colour and a shape, so that neither is needed to tell it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # disc
    "M-3.6 -3.6h7.2v7.2h-7.2z",  # square
    "M0 -4.6L4.5 3.4H-4.5z",  # triangle
    "M0 -5L5 0L0 5L-5 0z",  # diamond
    "M0 4.6L4.5 -3.4H-4.5z",  # triangle that stands on its tip
    "M-1.5 -4.6h3v3.1h3.1v3h-3.1v3.1h-3v-3.1h-3.1v-3h3.1z",  # plus
    "M-4.6 -2.2h9.2v4.4h-9.2z",  # bar
    "M-2.2 -4.6h4.4v9.2h-4.4z",  # upright bar
)
CSS = (
    "\n".join(f".m{i} {{ fill: var(--s{i}); color: var(--s{i}); }}" for i in range(len(_SHAPES)))
    + """
svg.mark { display: inline-block; width: 0.8rem; height: 0.8rem; vertical-align: -0.1rem; margin-right: 0.3rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.5rem 0; font-size: 0.88rem; max-width: none; }
"""
)


def mark(index: int, title: str = "", style: str = "") -> str:
    """The mark with this index, as an inline element."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    where = f' style="{style}"' if style else ""
    drawn = f'<path d="{shape(index)}"/>'
    return f'<svg class="mark {colour(index)}" viewBox="-6 -6 12 12" aria-hidden="true"{where}>{tip}{drawn}</svg>'


def shape(index: int) -> str:
    """The path of a mark, about the origin."""
    return _SHAPES[index % len(_SHAPES)]


def colour(index: int) -> str:
    """The class of a mark's colour; from the ninth mark on shapes come again, in other colours."""
    return f"m{(index + index // len(_SHAPES)) % len(_SHAPES)}"


def legend(names: Mapping[str, int], more: str = "") -> str:
    """Names and marks, from the indices of the marks, and `more` HTML behind them."""
    marked = "".join(f"<span>{mark(i)}{escape(name)}</span>" for name, i in names.items())
    return f'<p class="legend">{marked}{more}</p>'
