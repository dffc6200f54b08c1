"""What the tables and figures of a small result say, and which files count."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.result import ReportError, Result
from benchmarks.tables import (
    all_tables,
    digits,
    figures,
    headline_table,
    operation_section,
    plain,
    times_as_fast,
    where_dense_wins,
)

WHOLE_STEP = """\
| shape | dtype | provider | median ± IQR, ms | vs dense eager fp32 | vs dense compiled, same dtype | peak, MiB | of the floor | \
of the floor with gathers | error / limit |
| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |
| gpt2-small-16k | fp32 | dense eager fp32 | 5,850 ± 585 | 1.0x | 0.61x | 1,680 | - | - | 0.50 |
| gpt2-small-16k | fp32 | dense compiled fp32 | 3,570 ± 357 | 1.6x | 1.0x | 544 | - | - | 0.50 |
| gpt2-small-16k | bf16 | dense compiled bf16 | skipped: torch.compile needs a C++ compiler | - | - | - | - | - | - |
| gpt2-small-16k | fp32 | fused fp32 | 310 ± 31.0 | 19x | 11x | 111 | 64.5 % | 80.6 % | 0.50 |
| gpt2-small-16k | fp32 | sae-lens 6.54.12 | 6,200 ± 620 | 0.94x | 0.58x | 1,700 | - | - | 0.50 |
"""
HEADLINE = """\
|  | a training step | fastsae vs it | peak MiB | with glibc's default allocator |
| --- | --: | --: | --: | --: |
| **fastsae**, `fused fp32` | 310 ms | - | 111 | - |
| dense PyTorch, eager | 5,850 ms | 19x | 1,680 | - |
| dense PyTorch, `torch.compile` | 3,570 ms | 11x | 544 | - |
| dense PyTorch in bf16, `torch.compile` | skipped: torch.compile needs a C++ compiler | - | - | - |
| sae-lens 6.54.12 | 6,200 ms | 20x | 1,700 | - |
"""


def rows_of(content: dict[str, Any], operation: str) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in content["results"] if row["operation"] == operation}


def result_of(bench: Any, content: dict[str, Any]) -> Result:
    bench.add(content)
    return bench.results()[0]


def test_numbers_have_three_digits_ratios_two_and_sizes_all() -> None:
    values = [5849, 310.25, 0.58, 99.96, 1e-5, 0, None]
    assert [digits(value) for value in values] == ["5,850", "310", "0.580", "100", "0.0000100", "0.00", "-"]
    ratios = [18.75, 4.08, 0.914, 9.96, 118.2, 0.999, None]
    assert [times_as_fast(ratio) for ratio in ratios] == ["19x", "4.1x", "0.91x", "10x", "118x", "1.0x", "-"]
    assert [plain(1048576), plain(12.5)] == ["1,048,576", "12.5"]


def test_a_table_of_an_operation_and_the_headline(bench: Any, content: dict[str, Any]) -> None:
    result = result_of(bench, content)
    assert WHOLE_STEP in operation_section(result, "whole step")
    assert HEADLINE in headline_table([result], "benchmarks")
    scaling = operation_section(result, "scaling with L0")
    assert "4,096 tokens, d_in 768, d_sae 16,384.\n" in scaling
    assert "| 2,048 | fp32 | fused fp32 | 80.0 ± 8.00 | 1.1x |" in scaling


def test_a_red_row_says_why_and_has_no_time(bench: Any, content: dict[str, Any]) -> None:
    table = operation_section(result_of(bench, content), "forward+backward")
    assert "| eai-sparsify 1.3.3 | RED: error 0.033 against fp64, over the limit \\| of 1e-06 | - | - |" in table


def test_each_ratio_is_to_the_better_setting_of_the_allocator(bench: Any, content: dict[str, Any]) -> None:
    rows = rows_of(content, "whole step")
    rows["dense eager fp32"].update(median_s=3.1, iqr_s=0.1, allocator="tuned", other_median_s=5.849)
    rows["dense compiled fp32"].update(allocator="default", other_median_s=3.6)
    rows["fused fp32"]["speedup"] = 10.0
    result = result_of(bench, content)
    assert "| dense PyTorch, eager | 3,100 ms | 10x | 1,680 | 5,850 ms |" in headline_table([result], "b")
    assert "| dense PyTorch, `torch.compile` | 3,570 ms | 11x | 544 | 3,570 ms |" in headline_table([result], "b")
    assert "| dense eager fp32 | 3,100 ± 100 | 5,850 (default) | 1.0x |" in operation_section(result, "whole step")


def test_several_baselines_are_several_tables(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    bf16 = {"dtype": "bf16", "baseline": "dense eager bf16", "group": "whole step in bf16"}
    content["results"] += [make_row("whole step", f"{name} bf16", 5, **bf16) for name in ("dense eager", "fused")]
    table = operation_section(result_of(bench, content), "whole step")
    assert (table.count("| vs dense eager fp32 |"), table.count("| vs dense eager bf16 |")) == (1, 1)


def test_where_dense_wins(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    """Dense, a peer, and our own dense path asked for; each against ours of its dtype; a part of the work is no provider."""
    content["results"].append(make_row("whole step", "dense in tiles fp32", 300))
    rows_of(content, "whole step")["sae-lens 6.54.12"].update(median_s=0.2, iqr_s=0.02)
    rows_of(content, "forward+backward")["dense compiled bf16"]["median_s"] = 1e-3
    text = where_dense_wins(result_of(bench, content))
    assert "| encode, small | fp32 | dense, threshold | fused | 0.0078 | 0.561 | 0.600 | 0.94x |" in text
    assert "| sae-lens 6.54.12 | fused fp32 | 0.0048 | 200 | 310 | 0.64x |" in text
    assert "| dense in tiles fp32 | fused fp32 | 0.0048 | 300 | 310 | 0.97x |" in text
    assert text.count("\n| ") == 2 + 3
    rows_of(content, "whole step")["fused fp32"].update(status="red", median_s=None, iqr_s=None)
    assert "| sae-lens 6.54.12 | fused fp32 (red) | 0.0048 | 200 | - | - |" in where_dense_wins(
        result_of(bench, content)
    )
    content["results"] = content["results"][:3]
    assert where_dense_wins(result_of(bench, content)) == "### Where dense wins\n\nNowhere."


def test_no_claim_rests_on_an_unsteady_row(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    """One whose IQR exceeds half of its median: it is marked, has no ratio, and is compared with nothing."""
    eager, fused = make_row("encode", "dense eager fp32", 20), make_row("encode", "fused fp32", 30, speedup=0.67)
    content["results"] = [*content["results"][:5], eager, {**fused, "iqr_s": 0.016}]
    content["results"][0]["iqr_s"] = 3.0
    result = result_of(bench, content)
    assert "| dense PyTorch, eager | 5,850 ms (unsteady) | - | 1,680 |" in headline_table([result], "b")
    assert "| fused fp32 | 30.0 ± 16.0 (unsteady) | - |" in operation_section(result, "encode")
    assert "Nowhere." in where_dense_wins(result)
    assert figures([result])["step/dense-eager-fp32"] == "-"
    assert figures([result])["unsteady-rows"] == "2"


def test_figures_of_sentences(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    times = {"dense eager fp32": 120.0, "dense compiled bf16": 30.0, "fused fp32": 100.0, "fused bf16": 60.0}
    shape = {"shape": "gpt2-small-16k, half active", "n_tokens": 512, "l0": 8192}
    content["results"] += [make_row("forward+backward", name, ms, **shape) for name, ms in times.items()]
    assert figures([result_of(bench, content)]) == {
        "machine": "AMD EPYC (AVX512, bf16 units, 2 threads)",
        "max-density": "12.5 %",
        "cases-that-dense-wins": "2",
        "unsteady-rows": "0",
        "step": "310 ms",
        "step/peak": "111 MiB",
        "step/dense-eager-fp32": "19x",
        "step/dense-compiled-fp32": "11x",
        "step/dense-compiled-bf16": "-",
        "step/sae-lens": "20x",
        "pass": "357 ms",
        "pass/peak": "-",
        "pass/dense-eager-fp32": "18x",
        "pass/dense-compiled-bf16": "3.6x",
        "pass/eai-sparsify": "-",
        "half-active/dense-eager-fp32": "1.2x",
        "half-active/dense-compiled-bf16": "0.50x",
    }


def test_the_newest_file_of_each_machine_counts_and_a_gpu_comes_first(bench: Any, content: dict[str, Any]) -> None:
    bench.add({**content, "commit": "late", "finished": "2026-11-23T18:00:00+00:00"}, "a.json")
    bench.add(content, "b.json")
    bench.add({**content, "commit": "old", "date": "2026-11-22", "finished": "2026-11-24T00:00:00+00:00"}, "c.json")
    bench.add({**content, "machine": {**content["machine"], "gpu": "NVIDIA H200"}}, "d.json")
    results = bench.results()
    assert [(result.machine.gpu, result.commit) for result in results] == [("NVIDIA H200", "abc1234"), (None, "late")]
    assert "on NVIDIA H200; torch" in headline_table(results, "b")
    assert "## GPU: NVIDIA H200" in all_tables(results)


def test_each_commit_that_rows_were_measured_at_is_named(bench: Any, content: dict[str, Any]) -> None:
    content["results"][0]["commit"] = "0ld"
    assert result_of(bench, content).commits == "commits abc1234, 0ld"


@pytest.mark.parametrize(
    ("provider", "kind"),
    [("fused fp32", "fused"), ("dense eager, flat torch.topk", "dense"), ("embedding_bag", "dense"), ("sae-lens", "peer"),
     ("dense in tiles fp32", "tiles"), ("eai-sparsify, SignSGD 1.3.3", "peer"), ("product alone", "other")],
)  # fmt: skip
def test_kinds_of_providers(bench: Any, content: dict[str, Any], provider: str, kind: str) -> None:
    content["results"][0]["provider"] = provider
    assert result_of(bench, content).rows[0].kind == kind


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": {}, "results": [{"group": "encode"}]}'])
def test_a_file_that_is_no_result_is_named(bench: Any, content: dict[str, Any], text: str) -> None:
    path = bench.add(content)
    path.write_text(text)
    with pytest.raises(ReportError, match="not a result file") as raised:
        bench.results()
    assert str(raised.value).startswith(f"{path}: ")
    path.unlink()
    assert "no result files; `pytest benchmarks/ --results" in bench.report("--check")[1]
