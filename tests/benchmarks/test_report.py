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
from benchmarks.drawing import COLORS, TEXT, digest_of, draw, plots
from benchmarks.report import BEGIN, END
from benchmarks.result import newest_of_each_machine

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


def test_writes_everything_and_nothing_else(written: Any) -> None:
    plots = {path for path in written.written() if path.endswith(".svg")}
    assert set(written.written()) - plots == {"README.md", "benchmarks/README.md"}
    assert {path.split("threads_")[1] for path in plots} == {
        "whole-step.svg",
        "forward-backward.svg",
        "encode.svg",
        "scaling-with-L0.svg",
    }
    readme = written.readme.read_text(encoding="utf-8")
    assert readme.startswith(f"# name\n\n{BEGIN}\n|  | a training step |")
    assert readme.endswith(f"{END}\n\nthe rest\n")
    assert "old" not in readme


def test_every_link_leads_somewhere(written: Any) -> None:
    for path in (written.readme, written.folder / "README.md"):
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_nothing_is_stale_after_writing_and_check_writes_nothing(written: Any) -> None:
    before = written.written()
    status, printed = written.report("--check")
    assert (status, printed) == (0, "benchmarks.report: tables and plots are what the results give\n")
    assert "nothing to do" in written.report()[1]
    assert written.written() == before


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md", STEP_PLOT])
def test_changed_and_missing_files_are_stale(written: Any, path: str) -> None:
    file, right = written.folder.parent / path, written.written()
    text = right[path]
    digest = digest_of(text)
    file.write_text(text.replace(digest, "0" * 64) if digest else text.replace("310", "300"), encoding="utf-8")
    status, printed = written.report("--check")
    assert status == 1
    assert f"stale: {file} differs from what the results give\n" in printed
    assert printed.count("stale: ") == 1
    assert written.report()[0] == 0
    assert written.written() == right
    if path != "README.md":
        file.unlink()
        assert f"stale: {file} is missing\n" in written.report("--check")[1]


def test_text_around_the_block_is_the_authors(written: Any) -> None:
    text = written.readme.read_text(encoding="utf-8")
    written.readme.write_text(text.replace("the rest", "another rest"), encoding="utf-8")
    assert written.report("--check")[0] == 0


def test_new_results_make_all_three_stale(written: Any, content: dict[str, Any]) -> None:
    before = written.written()
    content["results"][3]["median_s"] = 0.4
    content["date"] = "2026-11-24"
    written.add(content, "newer.json")
    status, printed = written.report("--check")
    assert status == 1
    for path in ("README.md", "benchmarks/README.md", STEP_PLOT):
        assert f"{written.folder.parent / path} differs" in printed
    assert written.written() == before


def test_plots_without_results_go_and_those_of_others_stay(written: Any, content: dict[str, Any]) -> None:
    other = written.folder / "plots" / "loss_curves.svg"
    other.write_text("<svg/>", encoding="utf-8")
    content["results"] = [row for row in content["results"] if row["operation"] != "encode"]
    written.add(content)
    assert "_encode.svg shows what no result has" in written.report("--check")[1]
    assert "removed: " in written.report()[1]
    assert [path.name for path in (written.folder / "plots").glob("*encode*")] == []
    assert other.exists()
    assert written.report("--check")[0] == 0


def test_check_needs_no_matplotlib(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without_matplotlib(monkeypatch)
    for name in [name for name in sys.modules if name.startswith("benchmarks.drawing")]:
        monkeypatch.delitem(sys.modules, name)
    __import__("benchmarks.drawing")
    assert written.report("--check")[0] == 0
    assert written.report()[0] == 0, "nor does writing where every plot is up to date"
    (written.folder.parent / STEP_PLOT).unlink()
    assert written.report("--check")[0] == 1


def test_drawing_without_matplotlib_says_so_and_writes_nothing(
    bench: Any, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_matplotlib(monkeypatch)
    bench.add(content)
    before = bench.written()
    status, printed = bench.report()
    assert status == 1
    assert printed == 'benchmarks.report: error: the plots need matplotlib: pip install -e ".[plots]"\n'
    assert bench.written() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# name\n", f"the marker {BEGIN} must stand there once; it is not there"),
        (f"{BEGIN}\n", f"the marker {END} must stand there once; it is not there"),
        (f"{BEGIN}{END}{END}", f"the marker {END} must stand there once; it is 2"),
        (f"{END}{BEGIN}", f"{END} stands before {BEGIN}"),
        (None, "no such file"),
    ],
)
def test_readme_without_markers(bench: Any, content: dict[str, Any], text: str | None, message: str) -> None:
    bench.add(content)
    bench.readme.unlink() if text is None else bench.readme.write_text(text, encoding="utf-8")
    for arguments in ([], ["--check"]):
        status, printed = bench.report(*arguments)
        assert status == 1
        assert printed == f"benchmarks.report: error: {bench.readme}: {message}\n"
    assert not (bench.folder / "README.md").exists()


def test_figures_in_sentences_are_filled_in_and_the_words_left_alone(written: Any) -> None:
    sentence = "Ours takes <!-- n:step --><!-- /n -->, **<!-- n:step/sae-lens -->2x<!-- /n -->** as fast as\nSAELens.\n"
    written.readme.write_text(f"{sentence}{BEGIN}\n{END}\n", encoding="utf-8")
    assert f"stale: {written.readme} differs" in written.report("--check")[1]
    assert written.report()[0] == 0
    right = sentence.replace(" --><!--", " -->310 ms<!--").replace("2x", "20x")
    assert written.readme.read_text(encoding="utf-8").startswith(right)
    assert written.report("--check")[0] == 0


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
    status, printed = bench.report()
    assert status == 1
    assert printed.startswith(f"benchmarks.report: error: {bench.readme}: {message}")
    assert not (bench.folder / "README.md").exists()


def test_a_figure_of_an_unsteady_row_is_no_figure(bench: Any, content: dict[str, Any]) -> None:
    content["results"][0]["iqr_s"] = 0.6 * content["results"][0]["median_s"]
    bench.add(content)
    bench.readme.write_text(f"<!-- n:step/dense-eager-fp32 -->19x<!-- /n -->{BEGIN}{END}\n", encoding="utf-8")
    assert "a provider has no time or an unsteady one; measure again, or take the sentence out" in bench.report()[1]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "--check",
        "pytest benchmarks/ --results benchmarks/results",
        BEGIN,
        "<!-- n:",
        "matplotlib",
        "Exit status",
    ):
        assert words in text


def test_plots_are_the_same_twice_and_valid(bench: Any, content: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    bench.add(content)
    found = plots(newest_of_each_machine(bench.folder / "results"))
    for plot in found.values():
        svg = draw(plot)
        assert svg == draw(plot)
        assert digest_of(svg) == plot.digest()
        ET.fromstring(svg)
        for words in (*plot.subtitle.split("\n"), "ms"):
            assert words in svg
        assert "background" not in svg
        assert "fill: #ffffff" not in svg
    assert "dense path in tiles from L0 2,048 on" in draw(found[next(name for name in found if "scaling" in name)])
    assert "RED, no time" in draw(found[next(name for name in found if "forward" in name)])


def test_everything_is_the_same_twice(bench: Any, content: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    bench.add(content)
    assert bench.report()[0] == 0
    first = bench.written()
    for path in (bench.folder / "plots").glob("*.svg"):
        path.unlink()
    (bench.folder / "README.md").unlink()
    assert bench.report()[0] == 0
    assert bench.written() == first


def test_the_digest_knows_the_format(bench: Any, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add(content)
    plot = next(iter(plots(newest_of_each_machine(bench.folder / "results")).values()))
    before = plot.digest()
    monkeypatch.setattr(drawing, "FORMAT", drawing.FORMAT + 1)
    assert plot.digest() != before


def test_colors_stand_out_on_light_and_dark_pages() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a: str, b: str) -> float:
        dark, light = sorted((luminance(a), luminance(b)))
        return (light + 0.05) / (dark + 0.05)

    for page in ("#ffffff", "#0d1117"):
        assert all(contrast(color, page) >= 3 for color in COLORS.values())
        assert contrast(TEXT, page) >= 4


def test_the_repository_finds_its_own_readme() -> None:
    assert Path(report.README).name == "README.md"
    assert (Path(report.README).parent / "pyproject.toml").exists()
