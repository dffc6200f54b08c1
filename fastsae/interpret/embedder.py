"""Vectors of windows from static word embeddings: what two texts are about can be compared without a language model.

The embeddings are WordLlama's, by Lee Miller (MIT): 256 numbers for each of 32,000 pieces of words, trained so that the means of
similar texts are similar. They come inside the wheel `wordllama`, so that nothing is downloaded. The package's own code does not
run, as its loader looks for the tokenizer where the wheel does not have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.errors import FastsaeError
from fastsae.evaluate.dialogues import FloatArray
from fastsae.interpret.text import WindowTexts
from fastsae.interpret.windows import Window

BACKGROUND = 0.1
"""Weight of a token on which the feature is silent, beside 1 for the token on which it is largest."""

_WEIGHTS, _TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"


class Embedder:
    """Makes vectors of length 1 of windows.

    A token of the window weighs `activation / largest activation + BACKGROUND`, so that what the feature fires on counts more
    than what stands around it. In a window without activations all tokens weigh the same.

    Args:
        tokenizer: The one whose ids the windows hold.

    Raises:
        FastsaeError: The wheel `wordllama` is not installed, or another version of it has other files.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._vectors, self._splitter = static_embeddings()
        self._texts = WindowTexts(tokenizer)

    def embed(self, windows: Sequence[Window]) -> FloatArray:
        """The windows' vectors, `[len(windows), 256]`; zeros for a window without text."""
        pieces = [self._texts.pieces(window) for window in windows]
        encoded = self._splitter.encode_batch(["".join(parts) for parts in pieces], add_special_tokens=False)
        vectors = np.zeros((len(windows), self._vectors.shape[1]))
        for row, window, parts, parsed in zip(vectors, windows, pieces, encoded, strict=True):
            if parsed.ids:
                weights = _token_weights(window)[_owners(parts, parsed.offsets)]
                row[:] = weights @ self._vectors[parsed.ids]
        return unit(vectors)


def unit(vectors: FloatArray) -> FloatArray:
    """The vectors scaled to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def _token_weights(window: Window) -> FloatArray:
    activations = np.asarray(window.activations, dtype=np.float64)
    largest = activations.max()
    return activations / largest + BACKGROUND if largest > 0 else np.ones(len(activations))


def _owners(pieces: list[str], offsets: list[tuple[int, int]]) -> np.ndarray:
    """The window's token to which each piece of a word belongs, that in which its last character lies."""
    ends = np.cumsum([len(piece) for piece in pieces])
    last = np.array([max(end - 1, 0) for _, end in offsets])
    return np.minimum(np.searchsorted(ends, last, side="right"), len(pieces) - 1)


@cache
def static_embeddings() -> tuple[FloatArray, Any]:
    """The vectors, `[words, 256]`, and what splits a text into words; see `Embedder` for what it raises."""
    spec = find_spec("wordllama")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise FastsaeError(
            "the offline judge needs the word embeddings of `wordllama`, which is not installed: "
            "pip install fastsae-kernels[interpret]"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not all((folder / name).is_file() for name in (_WEIGHTS, _TOKENIZER)):
        raise FastsaeError(
            f"the installed `wordllama` ({folder}) does not hold {_WEIGHTS} and {_TOKENIZER}: "
            'pip install "wordllama==0.4.0.post1"'
        )
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    (vectors,) = load_file(folder / _WEIGHTS).values()
    return vectors.astype(np.float64), Tokenizer.from_file(str(folder / _TOKENIZER))
