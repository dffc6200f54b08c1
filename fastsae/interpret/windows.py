"""The pieces of dialogues by which a feature is known: windows around tokens on which it fires, or does not."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 32
"""Tokens of a window at most; the token that it shows stands in the middle unless a dialogue begins or ends there."""


@dataclass(frozen=True)
class Window:
    """Neighbouring tokens of one dialogue, and what a feature does on them.

    Attributes:
        dialogue: Index of the dialogue in its dataset.
        start: Position of the first token in the dialogue.
        tokens: Token ids, at most `WINDOW`.
        kinds: Whose each token is, a word of `fastsae.evaluate.token_kinds.KINDS`.
        activations: The feature on each token, 0 where it does not fire and on attention sinks.
        peak: Index into `tokens` of the token around which the window was cut.
    """

    dialogue: int
    start: int
    tokens: tuple[int, ...]
    kinds: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int

    @property
    def value(self) -> float:
        """The activation at the peak, 0 in a window in which the feature is silent."""
        return self.activations[self.peak]


@dataclass(frozen=True)
class FeatureExamples:
    """What is known of one feature on the dialogues of a store; attention sinks do not count.

    Attributes:
        feature: Its index.
        count: Tokens on which it fires.
        density: Their share of all tokens.
        maximum: Its largest activation.
        mean_special: Its mean over all special tokens, those on which it is silent among them.
        edges: `n + 1` ascending activations, the borders of the histogram's bins.
        histogram: `n` numbers of tokens.
        top: Windows around its largest activations, descending, one per dialogue.
        sampled: Windows around tokens drawn at random from those on which it fires, by descending activation, one per
            dialogue. A window may also stand in `top`.
    """

    feature: int
    count: int
    density: float
    maximum: float
    mean_special: float
    edges: tuple[float, ...]
    histogram: tuple[int, ...]
    top: tuple[Window, ...]
    sampled: tuple[Window, ...]
