"""Writes what the repository shows of its benchmarks, from the result files alone: `python -m benchmarks.report`.

It writes the tables between the markers of both READMEs, the figures in their sentences, and the SVG files in benchmarks/plots.
All words are written by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.plots import draw, mark_in, mark_of, plotted
from benchmarks.result import ReportError, Result, newest_of_each_machine
from benchmarks.tables import NONE, all_tables, figures, headline_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OPEN, CLOSE = "<!-- n:", "<!-- /n -->"
FIGURE = re.compile(rf"{OPEN}(\S+) -->[^<]*{CLOSE}")
HELP = f"""\
Writes the plots in benchmarks/plots, and in README.md and benchmarks/README.md the tables between {BEGIN} and
{END} and the figures of sentences, from the newest file of each machine in benchmarks/results. A sentence's figure
stands between two markers, the first of which names it:

  A step is {OPEN}step/dense-eager-fp32 -->10x{CLOSE} as fast as eager PyTorch.

  1. Measure, on each machine that shall appear:   pytest benchmarks/ --results benchmarks/results
  2. Write what follows from the files:            python -m benchmarks.report
  3. Commit results, tables and plots together.    CI runs: python -m benchmarks.report --check

A plot is drawn again only where the result changed; delete the file to force it. Drawing needs matplotlib
(pip install -e ".[plots]"), --check does not: each SVG names the result that it shows.
Exit status: 0 done, or nothing stale; 1 something is stale, or a file cannot be used; 2 wrong arguments."""


def texts(results: list[Result], folder: Path, readme: Path) -> dict[Path, str]:
    """Returns what both READMEs should hold.

    Raises:
        ReportError: A README's markers cannot be used.
    """
    link = Path(os.path.relpath(folder, readme.parent)).as_posix()
    blocks = {folder / "README.md": all_tables(results), readme: headline_table(results, link)}
    values = figures(results)
    return {path: _filled_in(path, block, values) for path, block in blocks.items()}


def _filled_in(readme: Path, block: str, values: dict[str, str]) -> str:
    """Returns a README's text with the block between its markers, and each figure between its own.

    Raises:
        ReportError: There is no README, or not exactly one pair of markers for the block; a figure's marker has no pair, or
            names what is no figure, or one that the results do not tell.
    """
    before, begin, rest = _read(readme).partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end) or any(marker in before + old + after for marker in (BEGIN, END)):
        raise ReportError(f"{readme}: one {BEGIN} and, below it, one {END} must stand there")
    text = f"{before}{BEGIN}\n{block}{END}{after}"
    names = FIGURE.findall(text)
    if not len(names) == text.count(OPEN) == text.count(CLOSE):
        raise ReportError(f"{readme}: a figure stands between '{OPEN}NAME -->' and '{CLOSE}'; one of them has no pair")
    for name in names:
        if name not in values:
            raise ReportError(f"{readme}: there is no figure {name!r}, but there are {', '.join(sorted(values))}")
        if values[name] == NONE:
            raise ReportError(
                f"{readme}: the results do not tell the figure {name!r}, because a provider has no time or an unsteady one;"
                " measure again, or take the sentence out"
            )
    return FIGURE.sub(lambda found: f"{OPEN}{found[1]} -->{values[found[1]]}{CLOSE}", text)


def stale_plots(results: list[Result], folder: Path) -> tuple[list[str], list[Path]]:
    """Returns plots to draw, and plots that show what no result has any more; files that this did not draw are left alone."""
    expected = {name: mark_of(result) for name, (result, _) in plotted(results).items()}
    found = {path.name: mark_in(_read(path)) for path in sorted(folder.glob("*.svg"))}
    to_draw = [name for name, mark in expected.items() if found.get(name) != mark]
    return to_draw, [folder / name for name, mark in found.items() if mark is not None and name not in expected]


def main(argv: list[str] | None = None, folder: Path = HERE, readme: Path = README) -> int:
    """Writes or checks; `folder` holds results, plots and README.md of the benchmarks. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; name what is stale and exit with 1")
    is_check = parser.parse_args(argv).check
    plots = folder / "plots"
    try:
        results = newest_of_each_machine(folder / "results")
        written = {path: text for path, text in texts(results, folder, readme).items() if _read(path) != text}
        to_draw, to_remove = stale_plots(results, plots)
        if is_check:
            stale = [*written, *(plots / name for name in to_draw), *to_remove]
            for path in stale:
                print(f"stale: {path}", file=sys.stderr)
            if stale:
                raise ReportError("run `python -m benchmarks.report` and commit what it writes")
            print("benchmarks.report: tables and plots are what the results give")
            return 0
        if to_draw and find_spec("matplotlib") is None:  # before anything is written
            raise ReportError('the plots need matplotlib: pip install -e ".[plots]"')
    except ReportError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 1
    plots.mkdir(exist_ok=True)
    written |= {plots / name: draw(*plotted(results)[name]) for name in to_draw}
    for path, text in written.items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"written: {path}")
    for path in to_remove:
        path.unlink()
        print(f"removed: {path}")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
