"""What `fastsae steer` prints: texts while they are written, what they measure dose by dose, and texts beside each other."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fastsae.steering.columns import beside, pad, printable, share, wrap
from fastsae.steering.order import groups, is_stable, text_rows
from fastsae.steering.result import Result, Run
from fastsae.steering.words import HOLDS, MEASURES, NOT_STEERED, Measure, dose_value, plain, run_name, stable_sentence

_NAME = 16  # columns of the name of a line; with the others 80
_COLUMNS = {  # head and columns of a measure
    "mean_kl": ("mean KL", 8),
    "p95_kl": ("p95 KL", 8),
    "perplexity": ("perplexity", 12),
    "repeated_3grams": ("repeats %", 11),
    "other_script": ("script %", 10),
    "n_tokens": ("tokens", 8),
}
_HOLDS = "  holds"
_NARROWEST_TEXT = 34  # columns; where less is left, texts stand below each other


@contextmanager
def streamed(titles: Sequence[str]) -> Iterator[Callable[[int, str], None]]:
    """Gives the `on_token` of `roll_out`: the first text is printed while it is written, and those beside it behind it.

    A batch writes all its texts at once, and a terminal has one cursor: later texts wait until the block ends, also by an error.

    Args:
        titles: What stands above the text of each row.
    """
    held: dict[int, list[str]] = {row: [] for row in range(1, len(titles))}
    if titles:
        print(_strong(printable(titles[0])), flush=True)

    def on_token(row: int, piece: str) -> None:
        if row:
            held[row].append(piece)
        else:
            print(printable(piece), end="", flush=True)

    try:
        yield on_token
    finally:
        print("\n" if titles else "")
        for row, pieces in held.items():
            print(f"{_strong(printable(titles[row]))}\n{printable(''.join(pieces))}\n")


def print_result(result: Result) -> None:
    """What was steered, a table of the measures with a line for each dose, and the stable range in a sentence for each arm."""
    columns = shutil.get_terminal_size().columns
    for line in _about(result):
        _print_wrapped(line, columns)
    of_table = _NAME + sum(size for _, size in _COLUMNS.values()) + len(_HOLDS)
    print(*(_table(result) if of_table <= columns else _stacked(result, columns)), sep="\n")
    print()
    for row in result["stable"]:
        _print_wrapped(printable(stable_sentence(row)), columns)
    _print_wrapped(
        "KL is from the unsteered model, in nats per token; perplexity is that of the text under the unsteered model; "
        "repeats are runs of three tokens that occur more than once; script is the letters in a script that the prompt does not "
        f"use. {HOLDS}",
        columns,
    )


def print_texts(result: Result, lines: int = 6) -> None:
    """The texts of each prompt, those of one alpha beside each other, or below each other where the terminal is narrow.

    Args:
        result: As in `steer.json`.
        lines: How many of a text are printed at most; the page and `steer.json` have the whole.
    """
    columns = shutil.get_terminal_size().columns
    for number, prompt in enumerate(result["prompts"]):
        print(f"\n{_strong(f'prompt {number + 1}')}")
        _print_wrapped(printable(prompt), columns)
        for row in text_rows(result):
            runs = [result["runs"][i] for i in row.runs]
            at_once = len(runs)
            while at_once > 1 and share(columns, at_once) < _NARROWEST_TEXT:
                at_once -= 1
            for start in range(0, len(runs), at_once):
                beside_each_other = runs[start : start + at_once]
                room = share(columns, at_once)
                blocks = [_text_block(run, number, room, lines) for run in beside_each_other]
                heads, *rest = beside(blocks, room)
                print("", _strong(heads), *rest, sep="\n")


def _text_block(run: Run, prompt: int, columns: int, lines: int) -> list[str]:
    name = printable(run_name(run))
    text = next((text for text in run["texts"] if text["prompt"] == prompt), None)
    if text is None:
        return [name, "(no text)"]
    wrapped = wrap(printable(text["text"]).strip(), columns) if text["text"] else ["(nothing was written)"]
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], pad(wrapped[lines - 1] + " …", columns)]
    kl, perplexity = (_figure(text[m.key], m).strip() for m in (MEASURES[0], MEASURES[2]))
    return [name, *wrapped, f"KL {kl}, perplexity {perplexity}"]


def _about(result: Result) -> list[str]:
    lines = [""]
    for chosen in result["features"]:
        score = "" if chosen["score"] is None else f", score {chosen['score']:.4g}"
        maximum = "" if chosen["maximum"] is None else f", largest activation seen {chosen['maximum']:.4g}"
        lines.append(printable(f"feature {chosen['feature']}: {chosen['chosen_by']}{score}{maximum}"))
    auto = result["auto"]
    if auto is not None:
        tried = f"{len(auto['tried'])} strengths were tried"
        lines.append(f"alpha auto: {plain(auto['alpha'])}, where the p95 KL is {auto['p95_kl']:.3f} nats ({tried})")
    return [*lines, ""]


def _table(result: Result) -> list[str]:
    """A line for each run below the name of its arm and dose; numbers end in the same column."""
    head = "".join(f"{name:>{size}}" for name, size in _COLUMNS.values())
    lines = [_faint(" " * _NAME + head)]
    for name, runs in groups(result["runs"]).items():
        if runs[0]["arm"] not in NOT_STEERED:
            lines.append(_strong(printable(name)))
        for run in runs:
            title = name if run["arm"] in NOT_STEERED else f"  {dose_value(run)}"
            cells = "".join(_figure(run[measure.key], measure) for measure in MEASURES)
            lines.append(pad(printable(title), _NAME) + cells + (_HOLDS if is_stable(result, run) else ""))
    return lines


def _stacked(result: Result, columns: int) -> list[str]:
    """For a narrow terminal: below the name of each run a line for each pair of measures, or for each measure."""
    names, sizes = zip(*_COLUMNS.values(), strict=True)
    of_name, of_number = max(map(len, names)), max(sizes)
    lines = []
    for runs in groups(result["runs"]).values():
        for run in runs:
            title = printable(run_name(run) + (" (holds)" if is_stable(result, run) else ""))
            lines += [_strong(line) for line in wrap(title, columns)]
            cells = [f"  {_COLUMNS[m.key][0]:{of_name}}{_figure(run[m.key], m):>{of_number}}" for m in MEASURES]
            at_once = max(1, min(3, columns // (2 + of_name + of_number)))
            lines += ["".join(cells[i : i + at_once]) for i in range(0, len(cells), at_once)]
    return lines


def _figure(value: float | None, measure: Measure) -> str:
    """A measure in as many columns as every other: decimals below each other, powers of ten where there is no room for them."""
    size = _COLUMNS[measure.key][1]
    if value is None:
        return f"{'-':>{size}}"
    shown = measure.factor * value
    text = f"{shown:.{measure.decimals}f}"
    return f"{text if len(text) < size else f'{shown:.1e}':>{size}}"


def _print_wrapped(text: str, columns: int) -> None:
    print(*wrap(text, columns), sep="\n")


def _strong(text: str) -> str:
    return _styled(text, "1")


def _faint(text: str) -> str:
    return _styled(text, "2")


def _styled(text: str, style: str) -> str:
    """Bold or faint where stdout is a terminal that can, and the reader has not asked for none."""
    is_plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if is_plain or not text else f"\033[{style}m{text}\033[0m"
