"""What models write in place of the JSON that they were asked for."""

import pytest

from fastsae.interpret.judges.parsing import find_json, read_number, read_words, read_yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": 4, "name": "x"}', 4),
        ('```json\n{"score": "4"}\n```', 4),
        ('Sure! {"score": 4.0} Anything else, {you}?', 4),
        ('{bad} {"score": "4/5"}', 4),
        ("The pattern is clear. [[4]] [[rain]]", 4),
        ("[[rain]], so [[ 4 ]]", 4),
        ("Score: 4/5", 4),
        ("4", 4),
        ("I give it a 4 out of 5.", 4),
        ("<think>5? 3? {1}</think>4", 4),
        ("Between 3 and 4", None),
        ("4.5", None),
        ("7", None),
        ('{"score": null}', None),
        ('{"score": true}', None),
        ('{"score": [4]}', None),
        ('{"score": 400000000000000000000000}', None),
        ("<think>4", None),
        ("", None),
        (None, None),
    ],
)
def test_numbers(text, expected):
    assert read_number(text, "score", 1, 5) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": " rain \\n and snow"}', "rain and snow"),
        ("[[4]] [[rain]]", "rain"),
        ("[[rain\nand snow]] [[4]]", "rain and snow"),
        ('{"name": 3}', None),
        ('{"name": " "}', None),
        ('{"label": "rain"}', None),
        ("rain", None),
        (None, None),
        ('{"name": "' + "a" * 999 + '"}', "a" * 200),
    ],
)
def test_words(text, expected):
    assert read_words(text, "name") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"active": [1, 0, 1]}', [1, 0, 1]),
        ('{"active": [true, "no", "1"]}', [1, 0, 1]),
        ("Here: [1, 0, 1].", [1, 0, 1]),
        ("[Yes, no, yes]", [1, 0, 1]),
        ('{"active": [1, 2, null]}', [1, None, None]),
        ('{"active": [1, 0]}', [None] * 3),
        ('{"active": [1, 0, 1, 0]}', [None] * 3),
        ('{"active": 1}', [None] * 3),
        ('{"fires": [1, 0, 1]}', [None] * 3),
        ('{"active": [1, 0,', [None] * 3),
        ("1 0 1", [None] * 3),
        (None, [None] * 3),
    ],
)
def test_lists_of_yes_and_no(text, expected):
    assert read_yes_or_no(text, "active", 3) == expected


def test_json_that_never_ends_is_none():
    assert find_json('{"a":' * 10**4) is None
    assert find_json("{" * 1000) is None
