"""Scores on planted features: those that stand for something score high, those that fire anywhere score as chance does.

Measured with the offline judge: its rubric calls 31 of 32 true features high (8 fire on the words of a topic, 8 on a tenth of
those words' places, 16 on a single word), and 8 of 300 that fire on one token in 200, anywhere. Detection's AUROC is 0.97 for
topics; for the 300 random features it is 0.506 (0.490 to 0.522), the intruder's share 0.201 (0.181 to 0.222), and example
embedding 0.511 (0.497 to 0.525).
"""

import json

import numpy as np
import pytest
from planted import TOPICS, WORDS, PlantedStore, at_random, on_some_words, on_words

from fastsae.errors import UsageError
from fastsae.interpret.judges.embedding import EmbeddingJudge
from fastsae.interpret.judges.protocol import Rating
from fastsae.interpret.scores import draw_features, score_features
from fastsae.interpret.scores.detection import auroc, draw_windows
from fastsae.interpret.scores.draws import FeatureDraw, dialogues

N_RANDOM = 40


@pytest.fixture(scope="module")
def store():
    true = [on_words(words) for words in TOPICS.values()] + [on_some_words(words) for words in TOPICS.values()]
    return PlantedStore([*true, *(at_random() for _ in range(N_RANDOM))])


@pytest.fixture(scope="module")
def judge():
    return EmbeddingJudge(WORDS)


@pytest.fixture(scope="module")
def of_true(store, judge):
    return score_features(store, judge, WORDS, range(16), 0)


@pytest.fixture(scope="module")
def of_random(store, judge):
    return score_features(store, judge, WORDS, range(16, 16 + N_RANDOM), 0)


class Script:
    """A judge that knows the answers, or nothing."""

    name = "script"

    def __init__(self, knows):
        self.knows = knows

    def rate(self, tasks):
        return [Rating(4, "theirs") if self.knows else Rating(None, None) for _ in tasks]

    def detect(self, tasks):
        return [[float(i < len(t.windows) // 2) if self.knows else None for i in range(len(t.windows))] for t in tasks]

    def find_intruder(self, tasks):
        return [None for _ in tasks]

    def facts(self):
        return {}


def test_features_that_stand_for_something_score_high(of_true):
    scores = of_true["scores"]
    assert scores["rubric"]["hits"] >= 15
    assert scores["rubric"]["chance"]["hits"] <= 1
    assert scores["detection"]["auroc"]["interval"][0] > 0.9
    assert scores["detection"]["balanced_accuracy"]["value"] > 0.8
    assert scores["intruder"]["interval"][0] > 0.8
    assert scores["example_embedding"]["interval"][0] > 0.95


def test_features_that_fire_anywhere_score_as_chance_does(of_random):
    scores = of_random["scores"]

    def is_chance(summary, chance, trials):
        return abs(summary["value"] - chance) < 4 * np.sqrt(chance * (1 - chance) / trials)

    assert scores["rubric"]["hits"] <= 5
    assert is_chance(scores["detection"]["balanced_accuracy"], 0.5, scores["detection"]["judged"])
    assert is_chance(scores["detection"]["auroc"], 0.5, scores["detection"]["judged"] / 4)  # pairs share windows
    assert is_chance(scores["intruder"], scores["intruder"]["chance"], scores["intruder"]["trials"])
    assert is_chance(scores["example_embedding"], 0.5, scores["example_embedding"]["trials"] / 4)


def test_scores_are_json_and_a_function_of_the_seed(store, judge, of_true):
    json.dumps(of_true, allow_nan=False)
    assert score_features(store, judge, WORDS, range(16), 0) == of_true
    assert score_features(store, judge, WORDS, range(16), 1) != of_true
    assert [row["feature"] for row in of_true["features"]] == list(range(16))


def test_no_dialogue_is_both_learnt_from_and_judged(store):
    for feature in range(16 + N_RANDOM):
        task, n_firing = draw_windows(FeatureDraw(store, feature, feature, 0, 2))
        learnt = dialogues([*task.evidence.firing, *task.evidence.silent])
        assert not learnt & dialogues(task.windows)
        assert len(dialogues(task.evidence.firing)) == len(task.evidence.firing)
        assert n_firing == len(task.windows) - n_firing == 10
        assert not any(any(window.activations) for window in task.windows)


def test_a_judge_that_knows_scores_1(store):
    scores = score_features(store, Script(True), WORDS, range(4), 0, ("rubric", "detection"))["scores"]
    assert scores["rubric"]["value"] == scores["detection"]["balanced_accuracy"]["value"] == 1
    assert scores["detection"]["auroc"]["value"] == 1
    assert scores["rubric"]["failed"] == scores["detection"]["failed"] == 0


def test_answers_that_cannot_be_read_are_wrong_and_counted(store):
    scores = score_features(store, Script(False), WORDS, range(4), 0, ("rubric", "detection", "intruder"))["scores"]
    assert (scores["rubric"]["value"], scores["rubric"]["failed"]) == (0, 4)
    assert scores["detection"]["balanced_accuracy"]["value"] == scores["detection"]["auroc"]["value"] == 0
    assert scores["detection"]["failed"] == scores["detection"]["judged"] == 80
    assert (scores["intruder"]["value"], scores["intruder"]["failed"]) == (0, 20)


def test_features_with_too_few_windows_are_left_out_and_counted():
    rare = PlantedStore([lambda tokens, random: [0.0] * len(tokens), on_words("onion")], n_top=4, n_sampled=4)
    found = score_features(rare, EmbeddingJudge(WORDS), WORDS, [1], 0)
    assert [summary["left_out"] for summary in found["scores"].values()] == [1, 1, 1, 1]
    assert [found["features"][0][name] for name in found["scores"]] == [None] * 4
    assert found["scores"]["rubric"]["value"] is found["scores"]["intruder"]["value"] is None


def test_features_are_drawn_by_seed_of_those_that_live(store):
    drawn = draw_features(store, 10, 3)
    assert drawn == sorted(set(drawn)) == draw_features(store, 10, 3) != draw_features(store, 10, 4)
    assert draw_features(store, 1000, 0) == store.alive(5)


def test_the_same_places_see_the_same_silent_windows(store):
    a, b = FeatureDraw(store, 0, 7, 0, 1), FeatureDraw(store, 5, 7, 0, 1)
    first, second = ([{(w.dialogue, w.start) for w in draw.silent(40)} for _ in range(2)] for draw in (a, b))
    assert len(first[0] & second[0]) > 20  # all but those in which one of them fires
    assert len(first[0] & first[1]) < 10


def test_an_unknown_score_is_named(store, judge):
    with pytest.raises(UsageError, match="got 'fuzzing'"):
        score_features(store, judge, WORDS, [0], 0, ["fuzzing"])


def test_auroc_counts_ties_as_half():
    assert auroc(np.array([1.0, 0.5]), np.array([0.5, 0.0])) == (3 + 0.5) / 4
