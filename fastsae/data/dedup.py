"""Remove near-duplicate dialogues by shared n-grams of words (algorithm 1 of the FAST paper)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np

from fastsae.data.chat import Dialogue
from fastsae.errors import UsageError

_BLOCK = 1024  # dialogues hashed in one go: enough to hide numpy's cost per call
_VOCABULARY = 1 << 20  # word hashes cached, about 150 MB at most
_MULTIPLIER = np.uint64(0xFF51AFD7ED558CCD)  # odd; the first constant of MurmurHash3's finaliser
_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class DedupReport:
    """How many dialogues were kept and dropped; `too_short` of the kept ones have no turn of n words."""

    kept: int
    dropped: int
    too_short: int


def dedup_ngrams(dialogues: Iterable[Dialogue], n: int = 20) -> tuple[list[int], DedupReport]:
    """Return the indices of the dialogues that share no n-gram with an earlier kept one, and a count.

    An n-gram is n consecutive words of one turn, split at white space. A dialogue with any n-gram seen before is
    dropped whole and adds nothing; otherwise all its n-grams become seen: the first one wins. A dialogue without a
    turn of n words has no n-gram and is always kept.

    Memory: 8 bytes per kept n-gram, up to 24 for a moment while sorted runs merge. About one per word of long turns:
    a million dialogues of 400 words take 3 GB.

    Numerics: n-grams are compared by 64-bit hashes that are the same in every process and version of Python. Among
    m n-grams the expected number of false matches is m^2 / 2^65: 0.004 for 4e8. The dialogues are read once, in order.

    Raises:
        UsageError: `n` is not positive.

    Source: arXiv:2506.07691, appendix B, algorithm 1.
    """
    if n < 1:
        raise UsageError(f"n: expected a positive number of words per n-gram, got {n}")
    seen = _SortedRuns()
    words = _WordHashes()
    kept: list[int] = []
    n_read = too_short = 0
    for block in _blocks(dialogues):
        hashes, owners = _ngram_hashes(block, n, words)
        order = np.argsort(hashes)  # lookups of sorted values walk through memory instead of jumping
        hashes, owners = hashes[order], owners[order]
        keep = np.ones(len(block), dtype=bool)
        keep[owners[seen.contains(hashes)]] = False
        _drop_repeats_within(keep, hashes, owners)
        seen.add(hashes[keep[owners]])
        has_ngram = np.zeros(len(block), dtype=bool)
        has_ngram[owners] = True
        too_short += int(np.count_nonzero(~has_ngram))
        kept.extend((np.flatnonzero(keep) + n_read).tolist())
        n_read += len(block)
    return kept, DedupReport(kept=len(kept), dropped=n_read - len(kept), too_short=too_short)


def _drop_repeats_within(keep: np.ndarray, hashes: np.ndarray, owners: np.ndarray) -> None:
    """Clear `keep` of each dialogue that repeats an n-gram of an earlier kept one of the same block.

    `hashes` are sorted. Only hashes that occur more than once matter, so only those go through Python.
    """
    equal = hashes[1:] == hashes[:-1]
    repeated = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
    grams: dict[int, set[int]] = {}
    for owner, value in zip(owners[repeated].tolist(), hashes[repeated].tolist(), strict=True):
        grams.setdefault(owner, set()).add(value)
    new: set[int] = set()
    for owner in sorted(grams):
        if keep[owner] and new.isdisjoint(grams[owner]):
            new |= grams[owner]
        else:
            keep[owner] = False


def _blocks(dialogues: Iterable[Dialogue]) -> Iterator[list[Dialogue]]:
    remaining = iter(dialogues)
    while block := list(islice(remaining, _BLOCK)):
        yield block


def _ngram_hashes(block: list[Dialogue], n: int, words: _WordHashes) -> tuple[np.ndarray, np.ndarray]:
    """Hash every n-gram of the dialogues: hashes [G] uint64, and the dialogue of each [G] int64."""
    hashes: list[int] = []
    lengths: list[int] = []
    owners: list[int] = []
    for i, dialogue in enumerate(block):
        for turn in dialogue:
            turn_words = turn["content"].split()
            if len(turn_words) >= n:
                hashes.extend(map(words.__getitem__, turn_words))
                lengths.append(len(turn_words))
                owners.append(i)
    words.forget_if_large()
    word_hashes = np.array(hashes, dtype=np.uint64)
    n_windows = max(len(hashes) - n + 1, 0)
    state = np.zeros(n_windows, dtype=np.uint64)
    for k in range(n):
        # A bijection of the state for each word, so that n-grams that differ in one word never collide.
        state ^= word_hashes[k : k + n_windows]
        state *= _MULTIPLIER
        state ^= state >> _SHIFT
    # Windows that cross from one turn into the next are no n-grams.
    counts = np.array(lengths, dtype=np.int64)
    position = np.arange(len(hashes)) - np.repeat(np.cumsum(counts) - counts, counts)
    inside = (position <= np.repeat(counts - n, counts))[:n_windows]
    owner = np.repeat(np.array(owners, dtype=np.int64), counts)[:n_windows]
    return state[inside], owner[inside]


class _WordHashes(dict[str, int]):
    """64-bit hash of each word, kept for the next time it occurs."""

    def __missing__(self, word: str) -> int:
        digest = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value

    def forget_if_large(self) -> None:
        if len(self) > _VOCABULARY:
            self.clear()


class _SortedRuns:
    """A set of uint64 in sorted arrays, each at least twice as long as the next: 8 bytes an element.

    A Python set of integers takes 70 to 150 bytes an element, too much for a dataset of a million dialogues.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def contains(self, values: np.ndarray) -> np.ndarray:
        found = np.zeros(len(values), dtype=bool)
        for run in self.runs:
            places = np.searchsorted(run, values)
            places[places == len(run)] = 0
            found |= run[places] == values
        return found

    def add(self, values: np.ndarray) -> None:
        """Add sorted values, repeated or not, that are not in the set yet."""
        if len(values) == 0:
            return
        run = values[np.insert(values[1:] != values[:-1], 0, True)]
        while self.runs and len(self.runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]), kind="stable")  # merges the two sorted halves
        self.runs.append(run)
