"""The offline judge: its embeddings against the package's own, and what it tells of sets of windows."""

import numpy as np
import pytest
from planted import WORDS, PlantedStore, on_words
from test_text import window

from fastsae.errors import FastsaeError
from fastsae.interpret import embedder
from fastsae.interpret.embedder import BACKGROUND, Embedder, unit
from fastsae.interpret.judges.embedding import EmbeddingJudge
from fastsae.interpret.judges.protocol import Evidence


def test_a_plain_window_has_the_mean_of_its_pieces():
    vectors, splitter = embedder.static_embeddings()
    ids = splitter.encode(" the telescope and a bank", add_special_tokens=False).ids
    expected = unit(vectors[ids].mean(0))
    np.testing.assert_allclose(Embedder(WORDS).embed([window("the telescope and a bank", [0] * 5)])[0], expected)


def test_pieces_weigh_as_the_token_that_they_are_part_of():
    vectors, splitter = embedder.static_embeddings()
    parsed = splitter.encode(" the goalkeeper and", add_special_tokens=False)
    assert len(parsed.ids) > 3  # the long word has several pieces
    weights = [BACKGROUND + (0 < end - 1 < 15 and end > 4) for _, end in parsed.offsets]
    expected = unit(np.asarray(weights) @ vectors[parsed.ids])
    np.testing.assert_allclose(Embedder(WORDS).embed([window("the goalkeeper and", [0, 7, 0], peak=1)])[0], expected)


def test_windows_without_text_are_zeros():
    assert not Embedder(WORDS).embed([window("", [])]).any()


def test_the_judge_names_the_words_at_the_peaks_and_rates_what_is_alike():
    store = PlantedStore([on_words("rain snow storm")])
    examples, judge = store.examples(0), EmbeddingJudge(WORDS)
    silent = tuple(store.silent(0, 40, seed=0, exclude=()))
    (rating,) = judge.rate([Evidence(examples.top[:5], silent)])
    assert rating.score == 5
    assert set(rating.name.split(", ")) <= {"rain", "snow", "storm"}
    (unlike,) = judge.rate([Evidence(silent[:5], silent[5:])])
    assert unlike.score <= 2


def test_the_judge_finds_the_window_of_another_kind():
    windows = [
        window("the snow and rain", [0, 9, 0, 0], peak=1),
        window("storm in the fog", [9, 0, 0, 0]),
        window("the jury and verdict", [0, 9, 0, 0], peak=1),
        window("hail and wind", [9, 0, 0]),
    ]
    assert EmbeddingJudge(WORDS).find_intruder([windows, windows[::-1]]) == [2, 1]


def test_without_its_wheel_the_judge_says_what_to_install(monkeypatch):
    embedder.static_embeddings.cache_clear()
    monkeypatch.setattr(embedder, "find_spec", lambda name: None)
    with pytest.raises(FastsaeError, match=r"pip install fastsae-kernels\[interpret\]"):
        EmbeddingJudge(WORDS)


def test_a_wheel_with_other_files_is_named(monkeypatch):
    embedder.static_embeddings.cache_clear()
    monkeypatch.setattr(embedder, "_WEIGHTS", "weights/none.safetensors")
    with pytest.raises(FastsaeError, match=r"does not hold weights/none.safetensors"):
        EmbeddingJudge(WORDS)
