"""dedup_ngrams against algorithm 1 written with Python strings and sets."""

import random
from hashlib import blake2b

import numpy as np
import pytest

from fastsae.data import dedup
from fastsae.data.dedup import DedupReport, dedup_ngrams
from fastsae.errors import UsageError


def literal_algorithm(dialogues, n):
    seen, kept, too_short = set(), [], 0
    for i, dialogue in enumerate(dialogues):
        grams = set()
        for turn in dialogue:
            words = turn["content"].split()
            grams |= {" ".join(words[k : k + n]) for k in range(len(words) - n + 1)}
        if grams & seen:
            continue
        seen |= grams
        kept.append(i)
        too_short += not grams
    return kept, DedupReport(len(kept), len(dialogues) - len(kept), too_short)


def chat(*texts):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize("block", [1, 3, 1024])
def test_equals_the_literal_algorithm(n, block, monkeypatch):
    monkeypatch.setattr(dedup, "_BLOCK", block)
    rng = random.Random(0)
    words = [f"w{i}" for i in range(40 * n)]
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 30))) for _ in range(60)]
    dialogues = [chat(*rng.choices(texts, k=rng.randint(0, 3))) for _ in range(300)]
    kept, report = dedup_ngrams(iter(dialogues), n)
    assert (kept, report) == literal_algorithm(dialogues, n)
    assert 0 < report.dropped < 300


def test_a_dropped_dialogue_adds_nothing_and_the_first_wins():
    dialogues = [chat("a b c"), chat("a b c", "d e f"), chat("d e f"), chat("x d e f")]
    assert dedup_ngrams(dialogues, 3) == ([0, 2], DedupReport(kept=2, dropped=2, too_short=0))


def test_windows_stay_inside_a_turn_and_short_turns_are_kept():
    dialogues = [chat("a b", "c d"), chat("b c", "x y"), chat("a b c d"), chat("z b  c\n\td")]
    assert dedup_ngrams(dialogues, 3) == ([0, 1, 2], DedupReport(kept=3, dropped=1, too_short=2))


def test_word_order_matters():
    assert dedup_ngrams([chat("a b c"), chat("c b a"), chat("b a c")], 3)[0] == [0, 1, 2]


def test_nothing_to_do():
    assert dedup_ngrams([]) == ([], DedupReport(0, 0, 0))


def test_n_must_be_positive():
    with pytest.raises(UsageError, match="n: expected a positive number"):
        dedup_ngrams([], 0)


def test_hashes_are_pinned_and_so_the_same_in_every_process_and_version():
    def pure_python(words):
        state = 0
        for word in words:
            state ^= int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
            state = state * 0xFF51AFD7ED558CCD % 2**64
            state ^= state >> 32
        return state

    hashes, owners = dedup._ngram_hashes([chat("one two three four")], 3, dedup._WordHashes())
    assert hashes.tolist() == [pure_python(["one", "two", "three"]), pure_python(["two", "three", "four"])]
    assert hashes[0] == 13348947309533846889
    assert owners.tolist() == [0, 0]


def test_sorted_runs_hold_what_was_added_in_few_arrays():
    rng = np.random.default_rng(0)
    values = np.unique(rng.integers(0, 2**64, 5000, dtype=np.uint64))
    runs = dedup._SortedRuns()
    for part in np.array_split(rng.permutation(values[::2]), 40):
        runs.add(np.sort(np.repeat(part, 2)))
    assert sum(map(len, runs.runs)) == len(values[::2])
    assert len(runs.runs) < 12
    np.testing.assert_array_equal(runs.contains(values), np.arange(len(values)) % 2 == 0)
