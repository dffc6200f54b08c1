"""The text of a window, as a judge reads it."""

from __future__ import annotations

from typing import Any

from fastsae.interpret.windows import Window

MARKED = 0.3
"""A token is marked where the feature reaches this share of its largest activation in the window."""


class WindowTexts:
    """Writes windows as text, token by token.

    A special token such as `<|im_start|>` is written `[im_start]`: within the prompt of a judge it would end a turn.

    Args:
        tokenizer: The one whose ids the windows hold.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._pieces: dict[int, str] = {}

    def pieces(self, window: Window) -> list[str]:
        """The text of each token; joined, they are the window's text."""
        return [self._piece(token) for token in window.tokens]

    def plain(self, window: Window) -> str:
        """The text, which tells nothing of the feature."""
        return "".join(self.pieces(window))

    def marked(self, window: Window) -> str:
        """The text with `<<` and `>>` around neighbouring tokens on which the feature is strong."""
        least = MARKED * max(window.activations)
        strong = [value > 0 and value >= least for value in window.activations]
        parts, inside = [], False
        for piece, is_strong in zip(self.pieces(window), strong, strict=True):
            if is_strong != inside:
                space = piece[: len(piece) - len(piece.lstrip())] if is_strong else ""  # a space before the mark
                parts.append(space + "<<" if is_strong else ">>")
                piece, inside = piece[len(space) :], is_strong
            parts.append(piece)
        return "".join(parts) + (">>" if inside else "")

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decode(token)
        return self._pieces[token]

    def _decode(self, token: int) -> str:
        text = str(self._tokenizer.decode([token]))
        if token in self._special:
            return f"[{text.strip('<|>[]')}]"
        spelt = getattr(self._tokenizer, "convert_ids_to_tokens", lambda _: "")(token)
        if isinstance(spelt, str) and spelt.startswith("\u2581") and not text.startswith(" "):
            return " " + text  # tokenizers of SentencePiece leave out the space before a lone word
        return text
