"""Counts of dropped dialogues: each once, with the first of each reason, through sums and checkpoints."""

import json

import pytest

from fastsae.data.dropped import Dropped


def some():
    drops = Dropped(seen=300)
    drops.add("it has fewer than 2 tokens", [7])
    drops.add("the line is damaged JSON", [4, 9])
    return drops


def test_counts_and_the_first_row_of_each_reason():
    drops = some()
    assert (drops.total, drops.counts) == (3, {"it has fewer than 2 tokens": 1, "the line is damaged JSON": 2})
    assert drops.first_rows == {"it has fewer than 2 tokens": 7, "the line is damaged JSON": 4}
    assert str(drops) == (
        "3 of 300 dialogues cannot be used: 2 because the line is damaged JSON (such as row 4), "
        "1 because it has fewer than 2 tokens (row 7)"
    )
    assert drops.metrics() == {
        "dialogues_dropped": 3,
        "dropped_by_reason": drops.counts,
        "dropped_first_rows": drops.first_rows,
    }


def test_a_sum_counts_both_and_changes_neither():
    other = Dropped(200, {"the line is damaged JSON": 5, "x": 1}, {"the line is damaged JSON": 1, "x": 2})
    total = some() + other
    assert total == Dropped(
        500,
        {"it has fewer than 2 tokens": 1, "the line is damaged JSON": 7, "x": 1},
        {"it has fewer than 2 tokens": 7, "the line is damaged JSON": 4, "x": 2},
    )
    total.add("x", [11])
    assert other.counts["x"] == 1


def test_more_than_one_percent_is_worth_a_warning():
    assert not Dropped().is_worth_a_warning
    assert not some().is_worth_a_warning  # 3 of 300
    assert (some() + Dropped(0, {"x": 1}, {"x": 0})).is_worth_a_warning


def test_the_state_survives_json():
    assert Dropped.from_state(json.loads(json.dumps(some().state_dict()))) == some()


@pytest.mark.parametrize(
    "state",
    [
        3,
        None,
        {},
        {"seen": 3, "counts": {}},
        {"seen": 1, "counts": {"a": 2}, "first_rows": {"a": 0}},
        {"seen": 9, "counts": {"a": -2}, "first_rows": {"a": 0}},
        {"seen": 9, "counts": {"a": True}, "first_rows": {"a": 0}},
        {"seen": 9, "counts": {"a": 2}, "first_rows": {}},
        {"seen": 9, "counts": [1], "first_rows": {}},
        {"seen": 9.0, "counts": {}, "first_rows": {}},
    ],
)
def test_another_state_is_refused(state):
    with pytest.raises(ValueError, match="expected"):
        Dropped.from_state(state)
