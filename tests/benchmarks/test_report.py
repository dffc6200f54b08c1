"""`python -m benchmarks.report`: what the tables say and do not claim, what --check finds stale, and its errors."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.plots import draw, mark_in, mark_of, plotted
from benchmarks.report import BEGIN, END
from benchmarks.result import Machine, ReportError, Row, newest_of_each_machine, read
from benchmarks.tables import (
    all_tables,
    digits,
    figures,
    headline_table,
    plain,
    section,
    times_as_fast,
    where_dense_wins,
)

STEP_PLOT = "benchmarks/plots/AMD-EPYC-AVX512-bf16-units-2-threads_whole-step.svg"


@pytest.fixture
def written(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All outputs, up to date; plots are their marks alone, so that matplotlib need not be there."""
    monkeypatch.setattr(report, "draw", lambda result, operation: f"<svg/><!-- {mark_of(result)} -->\n")
    monkeypatch.setattr(report, "find_spec", lambda name: True)
    bench.add()
    assert bench.report()[0] == 0
    return bench


def cells(text: str, *names: str) -> list[dict[str, str]]:
    """The lines of the tables in a text that hold all these names, each by its titles."""
    found, titles = [], []
    for line in text.splitlines():
        values = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if values and set(line) - set("|-: ") == set():
            continue
        titles = values if values and not titles else titles if values else []
        if values is not titles and set(names) <= set(values):
            found.append(dict(zip(titles, values, strict=True)))
    return found


def row_of(rows: list[Row], operation: str, provider: str) -> Row:
    return next(row for row in rows if (row.operation, row.provider) == (operation, provider))


def test_numbers_have_three_digits_ratios_two_and_sizes_all() -> None:
    values = [5849, 310.25, 0.58, 99.96, 1e-5, 0, None]
    assert [digits(value) for value in values] == ["5,850", "310", "0.580", "100", "0.0000100", "0.00", "-"]
    ratios = [18.75, 4.08, 0.914, 9.96, 118.2, 0.999, None]
    assert [times_as_fast(ratio) for ratio in ratios] == ["19x", "4.1x", "0.91x", "10x", "118x", "1.0x", "-"]
    assert [plain(1048576), plain(12.5)] == ["1,048,576", "12.5"]


def test_a_row_tells_time_ratios_memory_floor_and_error(bench: Any) -> None:
    (ours,) = cells(section(bench.result(), "whole step"), "fused fp32")
    assert (ours["median ± IQR, ms"], ours["peak, MiB"], ours["error / limit"]) == ("310 ± 31.0", "111", "0.50")
    assert (ours["vs dense eager fp32"], ours["vs dense compiled, same dtype"]) == ("19x", "11x")
    assert (ours["of the floor"], ours["of the floor with gathers"]) == ("64.5 %", "80.6 %")
    scaling = section(bench.result(), "scaling with L0")
    assert "4,096 tokens, d_in 768, d_sae 16,384.\n" in scaling
    assert cells(scaling, "2,048", "fused fp32")[0]["vs dense eager fp32"] == "1.1x"


def test_a_red_row_and_a_skipped_one_say_why_and_have_no_time(bench: Any) -> None:
    (red,) = cells(section(bench.result(), "forward+backward"), "fused bf16")
    assert red["median ± IQR, ms"] == r"RED: error 0.033 against fp64, over \| the limit of 1e-06"
    (skipped,) = cells(section(bench.result(), "whole step"), "dense compiled bf16")
    assert skipped["median ± IQR, ms"] == "skipped: torch.compile needs a C++ compiler"
    assert {red["vs dense eager fp32"], skipped["vs dense eager fp32"], skipped["peak, MiB"]} == {"-"}


def test_peers_before_and_after_stand_beside_their_goal(bench: Any) -> None:
    (line,) = cells(section(bench.result(), "peers before and after"), "sae-lens JumpReLU")
    assert (line["as it is, ms"], line["peak as it is, MiB"], line["accelerated, ms"]) == ("6,200", "1,700", "620")
    assert (line["times as fast"], line["with glibc's default allocator"], line["goal"]) == ("10x", "13x", "6.5x")
    assert (line["peak, MiB"], line["times as fast with it"]) == ("290", "-")
    (peer,) = cells(headline_table([bench.result()], "b"), "sae-lens JumpReLU")
    assert peer["times as fast"] == "10x"
    (peer,) = cells(headline_table([bench.result()], "b"), "sae-lens 6.54.12")
    assert (peer["fastsae vs it"], peer["with glibc's default allocator"]) == ("20x", "8,000 ms")


def test_each_ratio_is_to_the_better_setting_of_the_allocator(bench: Any) -> None:
    eager, fused = (row_of(bench.rows, "whole step", name) for name in ("dense eager fp32", "fused fp32"))
    eager.median_s, eager.iqr_s, eager.allocator, eager.other_median_s, fused.speedup = 3.1, 0.1, "tuned", 5.849, 10.0
    (line,) = cells(headline_table([bench.result()], "b"), "dense PyTorch, eager")
    assert (line["a training step"], line["fastsae vs it"]) == ("3,100 ms", "10x")
    assert line["with glibc's default allocator"] == "5,850 ms"
    (line,) = cells(section(bench.result(), "whole step"), "dense eager fp32", "5,850 (default)")
    assert line["median ± IQR, ms"] == "3,100 ± 100"


def test_where_dense_wins(bench: Any, make_row: Any) -> None:
    """Dense, a peer, and our own dense path asked for; each against ours of its dtype; a part of the work is no provider."""
    bench.rows.append(make_row("whole step", "dense in tiles fp32", 300))
    peer = row_of(bench.rows, "peers before and after", "sae-lens 6.54.12")
    peer.median_s, peer.iqr_s = 0.5, 0.05
    lines = where_dense_wins(bench.result())
    found = [(line["group"], line["faster"], line["fastsae vs it"]) for line in cells(lines, "fp32")]
    assert found == [
        ("whole step, gpt2-small-16k", "dense in tiles fp32", "0.97x"),
        ("peers before and after, sae-lens JumpReLU, gpt2-small-16k", "sae-lens 6.54.12", "0.81x"),
        ("encode, small", "dense, threshold", "0.94x"),
    ]
    assert figures([bench.result()])["cases-that-dense-wins"] == "3"
    row_of(bench.rows, "encode", "fused").status = "red"
    row_of(bench.rows, "encode", "fused").median_s = None
    assert cells(where_dense_wins(bench.result()), "fused (red)")[0]["fastsae vs it"] == "-"


def test_no_claim_rests_on_an_unsteady_row(bench: Any) -> None:
    """One whose IQR exceeds half of its median: it is marked, has no ratio, and is compared with nothing."""
    eager, fused = row_of(bench.rows, "whole step", "dense eager fp32"), row_of(bench.rows, "encode", "fused")
    eager.iqr_s, fused.iqr_s = 3.0, 4e-4
    result = bench.result()
    (line,) = cells(headline_table([result], "b"), "dense PyTorch, eager")
    assert (line["a training step"], line["fastsae vs it"]) == ("5,850 ms (unsteady)", "-")
    (line,) = cells(section(result, "encode"), "fused")
    assert (line["median ± IQR, ms"], line["vs product alone"]) == ("0.600 ± 0.400 (unsteady)", "-")
    assert where_dense_wins(result).endswith("Nowhere.")
    assert (figures([result])["step/dense-eager-fp32"], figures([result])["unsteady-rows"]) == ("-", "2")


def test_figures_of_sentences(bench: Any, make_row: Any) -> None:
    times = {"dense eager fp32": 120.0, "dense compiled bf16": 30.0, "fused fp32": 100.0, "fused bf16": 60.0}
    bench.rows += [make_row("forward+backward", name, ms, "gpt2-small-16k, half active") for name, ms in times.items()]
    peer = {"subject": "eai-sparsify TopK", "baseline": "eai-sparsify 1.3.3"}
    bench.rows += [
        make_row("peers before and after", name, ms, **peer, shape=shape)
        for shape, factor in {"gpt2-small-16k": 2.0, "512 tokens": 1.5}.items()
        for name, ms in {"eai-sparsify 1.3.3": 12 * factor, "accelerated": 12, "accelerated, FusedSAEAdam": 6}.items()
    ]
    expected = {
        "max-density": "12.5 %", "step": "310 ms", "step/dense-eager-fp32": "19x", "step/dense-compiled-bf16": "-",
        "half-active/dense-eager-fp32": "1.2x", "half-active/dense-compiled-bf16": "0.50x",
        "accelerate/sae-lens-JumpReLU": "10x", "accelerate/eai-sparsify-TopK": "2.0x", "accelerate/least": "2.0x",
        "accelerate/eai-sparsify-TopK/FusedSAEAdam": "4.0x", "accelerate-512-tokens/least": "1.5x",
    }  # fmt: skip
    found = figures([bench.result()])
    assert {name: found[name] for name in expected} == expected


def test_the_newest_file_of_each_machine_counts_and_a_gpu_comes_first(bench: Any) -> None:
    bench.add("a.json", commit="late", finished="2026-11-23T18:00:00+00:00")
    bench.add("b.json")
    bench.add("c.json", commit="old", date="2026-11-22", finished="2026-11-24T00:00:00+00:00")
    bench.add("d.json", Machine("AMD EPYC", 16, "3.11.7", "2.13.0", gpu="NVIDIA H200"))
    results = newest_of_each_machine(bench.folder / "results")
    assert [(result.machine.gpu, result.commit) for result in results] == [("NVIDIA H200", "abc1234"), (None, "late")]
    assert "on NVIDIA H200; torch" in headline_table(results, "b")
    assert "## GPU: NVIDIA H200" in all_tables(results)


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": {}, "results": [{"group": "encode"}]}'])
def test_a_file_that_is_no_result_is_named(bench: Any, text: str) -> None:
    path = bench.add()
    path.write_text(text)
    with pytest.raises(ReportError, match=f"{re.escape(str(path))}: not a result file"):
        read(path)
    path.unlink()
    assert "no result files; `pytest benchmarks/ --results" in bench.report("--check")[1]


def test_a_file_is_read_as_it_was_written(bench: Any) -> None:
    result = bench.result()
    assert (result.rows, result.seconds, result.commits) == (bench.rows, 412.3, "commit abc1234")
    bench.rows[0].commit = "0ld"
    assert bench.result().commits == "commits abc1234, 0ld"


# ---- the command


def test_writes_tables_and_plots_and_leaves_the_words_alone(written: Any) -> None:
    found = {path.partition("threads_")[2] or path for path in written.files()}
    names = ("whole-step", "forward-backward", "peers-before-and-after", "encode", "scaling-with-L0")
    assert found == {f"{name}.svg" for name in names} | {"README.md", "benchmarks/README.md"}
    for readme in (written.readme, written.folder / "README.md"):
        text = readme.read_text(encoding="utf-8")
        assert text.startswith(f"# name\n\n{BEGIN}\n")
        assert text.endswith(f"{END}\n\nthe rest\n")
        assert f"{BEGIN}\nold" not in text
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (readme.parent / target.partition("#")[0]).exists(), target


def test_check_writes_nothing_and_names_what_is_stale(written: Any) -> None:
    before = written.files()
    assert written.report("--check") == (0, "benchmarks.report: tables and plots are what the results give\n")
    written.rows[0].median_s = 6.0
    written.add(finished="2026-11-23T11:00:00+00:00")
    status, printed = written.report("--check")
    assert status == 1
    for path in ("README.md", "benchmarks/README.md", STEP_PLOT):
        assert f"stale: {written.folder.parent / path}\n" in printed
    assert written.files() == before


def test_plots_without_results_go_and_those_of_others_stay(written: Any) -> None:
    other = written.folder / "plots" / "loss_curves.svg"
    other.write_text("<svg/>", encoding="utf-8")
    written.rows = [row for row in written.rows if row.operation != "encode"]
    written.add()
    assert "_encode.svg\n" in written.report("--check")[1]
    assert "removed: " in written.report()[1]
    assert not list((written.folder / "plots").glob("*encode*"))
    assert other.exists()


def test_only_drawing_needs_matplotlib(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert written.report("--check")[0] == written.report()[0] == 0
    (written.folder.parent / STEP_PLOT).unlink()
    before = written.files()
    message = 'benchmarks.report: error: the plots need matplotlib: pip install -e ".[plots]"\n'
    assert written.report() == (1, message)
    assert written.files() == before


def test_figures_in_sentences_are_filled_in(written: Any) -> None:
    sentence = "Ours takes <!-- n:step --><!-- /n -->, **<!-- n:accelerate/least -->2x<!-- /n -->** as fast.\n"
    written.readme.write_text(f"{sentence}{BEGIN}\n{END}\n", encoding="utf-8")
    assert f"stale: {written.readme}\n" in written.report("--check")[1]
    assert written.report()[0] == 0
    right = sentence.replace(" --><!--", " -->310 ms<!--").replace("2x", "10x")
    assert written.readme.read_text(encoding="utf-8").startswith(right)


PAIR = f"{BEGIN}{END}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, f"one {BEGIN} and") for text in (None, "# name", BEGIN, f"{PAIR}{END}", f"{END}{BEGIN}")),
        (f"<!-- n:stride -->1<!-- /n -->{PAIR}", "there is no figure 'stride', but there are accelerate/least, "),
        (f"<!-- n:step/dense-compiled-bf16 -->1<!-- /n -->{PAIR}", "the results do not tell the figure 'step/dense-c"),
        (f"<!-- n:step -->1{PAIR}", "a figure stands between '<!-- n:NAME -->' and '<!-- /n -->'"),
        (f"1<!-- /n -->{PAIR}", "a figure stands between '<!-- n:NAME -->' and '<!-- /n -->'"),
    ],
)
def test_a_readme_that_cannot_be_filled_in_is_named(bench: Any, text: str | None, message: str) -> None:
    """It is not there, its markers have no pair, or one names a figure that there is not."""
    bench.add()
    bench.readme.unlink() if text is None else bench.readme.write_text(text, encoding="utf-8")
    for arguments in ([], ["--check"]):
        status, printed = bench.report(*arguments)
        assert status == 1
        assert printed.startswith(f"benchmarks.report: error: {bench.readme}: {message}")


def test_plots_are_the_same_twice_and_valid(bench: Any) -> None:
    pytest.importorskip("matplotlib")
    drawn = {name: draw(*what) for name, what in plotted([bench.result()]).items()}
    for name, what in plotted([bench.result()]).items():
        assert drawn[name] == draw(*what)
        assert mark_in(drawn[name]) == mark_of(bench.result())
        ET.fromstring(drawn[name])
    (scaling,), (passes,) = ([svg for name, svg in drawn.items() if word in name] for word in ("scaling", "forward"))
    assert "dense path in tiles from L0 2,048 on" in scaling
    assert "RED, no time" in passes


def test_the_repository_shows_what_its_results_give() -> None:
    assert (Path(report.README).parent / "pyproject.toml").exists()
    assert report.main(["--check"]) == 0
