"""`python -m benchmarks.report`: what it writes, what --check finds stale, and what it says where it cannot."""

from __future__ import annotations

import builtins
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drawing, report
from benchmarks.drawing import digest_of, draw, plots
from benchmarks.report import BEGIN, END

STEP_PLOT = "benchmarks/plots/AMD-EPYC-AVX512-bf16-units-2-threads_whole-step.svg"


@pytest.fixture
def written(bench: Any, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """All outputs, up to date; plots are drawn as their digests alone, so that matplotlib need not be there."""
    monkeypatch.setattr(report, "draw", lambda plot: f"<svg/><!-- {drawing.MARK} {plot.digest()} -->\n")
    monkeypatch.setattr(report, "find_spec", lambda name: True)
    bench.add(content)
    assert bench.report()[0] == 0
    return bench


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fake)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)


def test_writes_tables_and_plots_and_leaves_the_words_alone(written: Any) -> None:
    found = {path.partition("threads_")[2] or path for path in written.written()}
    plots = {f"{name}.svg" for name in ("whole-step", "forward-backward", "encode", "scaling-with-L0")}
    assert found == plots | {"README.md", "benchmarks/README.md"}
    for readme in (written.readme, written.folder / "README.md"):
        text = readme.read_text(encoding="utf-8")
        assert text.startswith(f"# name\n\n{BEGIN}\n")
        assert text.endswith(f"{END}\n\nthe rest\n")
        assert f"{BEGIN}\nold" not in text
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (readme.parent / target.partition("#")[0]).exists(), target


def test_check_writes_nothing_and_names_what_is_stale(written: Any, content: dict[str, Any]) -> None:
    before = written.written()
    assert written.report("--check") == (0, "benchmarks.report: tables and plots are what the results give\n")
    content["results"][0]["median_s"] = 6.0
    written.add(content)
    status, printed = written.report("--check")
    assert status == 1
    for path in ("README.md", "benchmarks/README.md", STEP_PLOT):
        assert f"stale: {written.folder.parent / path}\n" in printed
    assert written.written() == before


def test_plots_without_results_go_and_those_of_others_stay(written: Any, content: dict[str, Any]) -> None:
    other = written.folder / "plots" / "loss_curves.svg"
    other.write_text("<svg/>", encoding="utf-8")
    content["results"] = [row for row in content["results"] if row["operation"] != "encode"]
    written.add(content)
    assert "_encode.svg\n" in written.report("--check")[1]
    assert "removed: " in written.report()[1]
    assert [path.name for path in (written.folder / "plots").glob("*encode*")] == []
    assert other.exists()


def test_only_drawing_needs_matplotlib(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without_matplotlib(monkeypatch)
    assert written.report("--check")[0] == written.report()[0] == 0
    (written.folder.parent / STEP_PLOT).unlink()
    before = written.written()
    message = 'benchmarks.report: error: the plots need matplotlib: pip install -e ".[plots]"\n'
    assert written.report() == (1, message)
    assert written.written() == before


@pytest.mark.parametrize("text", ["# name\n", f"{BEGIN}\n", f"{BEGIN}{END}{END}", f"{END}{BEGIN}", None])
def test_readme_without_markers(bench: Any, content: dict[str, Any], text: str | None) -> None:
    bench.add(content)
    bench.readme.unlink() if text is None else bench.readme.write_text(text, encoding="utf-8")
    for arguments in ([], ["--check"]):
        status, printed = bench.report(*arguments)
        assert status == 1
        assert printed.startswith(f"benchmarks.report: error: {bench.readme}: one {BEGIN} and")


def test_figures_in_sentences_are_filled_in(written: Any) -> None:
    sentence = "Ours takes <!-- n:step --><!-- /n -->, **<!-- n:step/sae-lens -->2x<!-- /n -->** as fast as\nSAELens.\n"
    written.readme.write_text(f"{sentence}{BEGIN}\n{END}\n", encoding="utf-8")
    assert f"stale: {written.readme}\n" in written.report("--check")[1]
    assert written.report()[0] == 0
    right = sentence.replace(" --><!--", " -->310 ms<!--").replace("2x", "20x")
    assert written.readme.read_text(encoding="utf-8").startswith(right)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- n:stride -->1<!-- /n -->",
            "there is no figure 'stride', but there are cases-that-dense-wins, machine, ",
        ),
        (
            "<!-- n:step/dense-compiled-bf16 -->1<!-- /n -->",
            "the results do not tell the figure 'step/dense-compiled-bf16'",
        ),
        ("<!-- n:step -->1", "a figure stands between '<!-- n:NAME -->' and '<!-- /n -->'"),
        ("1<!-- /n -->", "a figure stands between '<!-- n:NAME -->' and '<!-- /n -->'"),
    ],
)
def test_figures_that_there_are_not(bench: Any, content: dict[str, Any], text: str, message: str) -> None:
    bench.add(content)
    bench.readme.write_text(f"{text}\n{BEGIN}{END}\n", encoding="utf-8")
    assert bench.report()[1].startswith(f"benchmarks.report: error: {bench.readme}: {message}")


def test_plots_are_the_same_twice_and_valid(
    bench: Any, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    bench.add(content)
    found = plots(bench.results())
    for plot in found.values():
        svg = draw(plot)
        assert svg == draw(plot)
        assert digest_of(svg) == plot.digest()
        ET.fromstring(svg)
        for words in (*plot.subtitle.split("\n"), "ms"):
            assert words in svg
    assert "dense path in tiles from L0 2,048 on" in draw(found[next(name for name in found if "scaling" in name)])
    plot = found[next(name for name in found if "forward" in name)]
    assert "RED, no time" in draw(plot)
    before = plot.digest()
    monkeypatch.setattr(drawing, "FORMAT", drawing.FORMAT + 1)
    assert plot.digest() != before


def test_the_repository_shows_what_its_results_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert (Path(report.README).parent / "pyproject.toml").exists()
    assert report.main(["--check"]) == 0
