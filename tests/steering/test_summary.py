"""What steering prints: no text moves the cursor, numbers stand below each other, and lines fit the terminal."""

from __future__ import annotations

import sys

import pytest

from fastsae.steering.columns import beside, pad, printable, width, wrap
from fastsae.steering.summary import print_result, print_texts, streamed
from tests.steering.steer_examples import HOSTILE, PROMPTS, result

ROWS = ("unsteered", "prompted", "  alpha", "  from", "  budget", "  target")


def is_harmless(text: str) -> bool:
    return not any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in text if sign != "\n") and "\u202e" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x00\x7f", "a\\rb\\x00\\x7f"),
        ("\u202egnp", "\\u202egnp"),
        ("\u2028\u2066", "\\u2028\\u2066"),
        ("\ud800", "\\ud800"),
        ("\t", "    "),
        ("a\nb 你好 👩‍👩‍👧 שלום", "a\nb 你好 👩‍👩‍👧 שלום"),
        ("", ""),
    ],
)
def test_signs_that_a_terminal_obeys_are_written_as_escapes(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_wide_signs_take_two_columns_and_marks_none() -> None:
    assert [width(text) for text in ("abc", "你好", "e\u0301", "", "ｱ")] == [3, 4, 1, 0, 1]
    assert pad("你好", 6) == "你好  "
    assert pad("你好吗", 5) == "你好…"
    assert pad("你好吗", 4) == "你… "


def test_lines_break_between_words_and_fit() -> None:
    assert wrap("the sea is wide", 7) == ["the sea", "is wide"]
    assert wrap("one\n\n  two", 10) == ["one", "", "  two"]
    assert wrap("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert wrap("a 你好你好", 5) == ["a", "你好", "你好"]
    assert wrap("你", 1) == ["你"]  # what is wider than all of the terminal is printed whole
    assert wrap("", 10) == [""]
    text = printable("".join(HOSTILE))
    for columns in (3, 10, 40):
        lines = wrap(text, columns)
        assert max(map(width, lines)) <= columns
        assert "".join("".join(lines).split()) == "".join(text.split())  # nothing is lost but spaces


def test_blocks_of_different_heights_stand_beside_each_other() -> None:
    assert beside([["a", "b"], ["你", "d", "e"]], 4) == ["a      你", "b      d", "       e"]


def test_the_first_text_is_streamed_and_the_others_follow_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with streamed(["alpha 15, prompt 1", "alpha 15, prompt 2"]) as on_token:
        on_token(0, "The")
        on_token(1, "Bread")
        on_token(0, " sea\x1b[2J")
        assert capsys.readouterr().out == "alpha 15, prompt 1\nThe sea\\x1b[2J"
        on_token(1, " is\r")
    assert capsys.readouterr().out == "\n\nalpha 15, prompt 2\nBread is\\r\n\n"


def test_a_run_that_fails_leaves_its_texts_and_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with streamed(["one", "two"]) as on_token:
            on_token(1, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().out == "one\n\n\ntwo\nhalf\n\n"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def at(columns: int) -> tuple[str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        print_result(result())
        table = capsys.readouterr().out
        print_texts(result())
        return table, capsys.readouterr().out

    return at


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_lines_fit_the_terminal_and_no_text_steers_it(printed, columns: int) -> None:
    for text in printed(columns):
        assert is_harmless(text)
        assert max(map(width, text.splitlines())) <= max(columns, 30)


def test_numbers_of_a_measure_end_in_the_same_column(printed) -> None:
    table, _ = printed(80)
    head = next(line for line in table.splitlines() if "perplexity" in line)
    lines = [line for line in table.splitlines() if line.startswith(ROWS)]
    assert len(lines) == len(result()["runs"])
    for name in ("mean KL", "p95 KL", "perplexity", "repeats %", "script %", "tokens"):
        end = head.index(name) + len(name)
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for line in lines), name
    points = {line.index(".", 16) for line in lines if "-" not in line}
    assert len(points) == 1


def test_measures_stable_doses_and_what_is_undefined_are_printed(printed) -> None:
    table, _ = printed(80)
    lines = {line[:16].strip(): line for line in table.splitlines()}
    assert lines["prompted"].split() == ["prompted", "-", "-", "4.05", "5.8", "1.5", "31.0"]
    assert "1.0e+30" in table  # without room, a power of ten
    steered = table.partition("random direction")[0].splitlines()
    assert [line.split()[1] for line in steered if line.endswith("holds")] == ["0", "15", "25", "50"]
    flat = " ".join(table.split())
    assert "feature 13794, fixed: the texts hold from alpha 0 to 50 (at 100 repeats pass 20 %)." in flat
    assert "feature 13794, decay: the texts hold at no dose of the grid" in flat
    assert "alpha auto: 37.5, where the p95 KL is 1.020 nats (2 strengths were tried)" in flat
    assert "feature 7: --feature" in flat


def test_a_narrow_terminal_has_the_same_figures(printed) -> None:
    (wide, _), (narrow, _) = printed(80), printed(40)
    figures = [word for line in wide.splitlines() if line.startswith("  alpha") for word in line.split()[2:8]]
    assert [word for word in figures if word not in narrow.split()] == []
    assert "feature 13794, alpha 50 (holds)" in narrow


def test_texts_of_one_alpha_stand_beside_each_other_where_there_is_room(printed) -> None:
    (_, narrow), (_, wide) = printed(50), printed(100)
    pair = ("feature 13794, alpha 15", "random direction, alpha 15")
    assert any(all(name in line for name in pair) for line in wide.splitlines())
    assert not any(all(name in line for name in pair) for line in narrow.splitlines())
    for text in (narrow, wide):
        assert text.count(pair[1]) == len(PROMPTS)
        assert "(nothing was written)" in text
        assert "alpha 0" not in text  # those texts are the unsteered ones again


def test_bold_is_for_terminals_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result())
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_result(result())
    assert "\033[1mfeature 13794, fixed\033[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    print_result(result())
    assert "\033" not in capsys.readouterr().out
