"""Windows that do not betray by their activations whether a feature fires in them."""

from __future__ import annotations

from dataclasses import replace

from fastsae.interpret.windows import Window


def unmarked(window: Window) -> Window:
    """The window without activations, so that its text alone can tell."""
    return replace(window, activations=(0.0,) * len(window.tokens))


def disguised(silent: Window, firing: Window) -> Window:
    """A silent window that bears the activations of a firing one, peak on peak.

    Beside firing windows a silent one would stand out, as nothing in it is marked.

    Args:
        silent: The window whose text is kept.
        firing: The window whose activations are borrowed, as far as they fall into the silent one.
    """
    shift = firing.peak - silent.peak
    borrowed = dict(enumerate(firing.activations))
    return replace(silent, activations=tuple(borrowed.get(i + shift, 0.0) for i in range(len(silent.tokens))))
