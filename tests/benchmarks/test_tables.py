"""The tables from a small result, to the letter; red and skipped rows; where dense wins."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.headline import figures, readme_block
from benchmarks.result import Result, newest_of_each_machine
from benchmarks.tables import benchmarks_readme, digits, operation_section, plain, times_as_fast, where_dense_wins

WHOLE_STEP = """\
### Whole step

| shape | dtype | provider | median ± IQR, ms | vs dense eager fp32 | vs dense compiled, same dtype | peak, MiB | GB/s | \
of the floor | error | match |
| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --- |
| gpt2-small-16k | fp32 | dense eager fp32 | 5,850 ± 585 | 1.0x | 0.61x | 1,680 | - | - | 1.50e-07 | ok |
| gpt2-small-16k | fp32 | dense compiled fp32 | 3,570 ± 357 | 1.6x | 1.0x | 544 | - | - | 1.50e-07 | ok |
| gpt2-small-16k | bf16 | dense compiled bf16 | - | - | - | - | - | - | - | skipped: torch.compile needs a C++ compiler |
| gpt2-small-16k | fp32 | fused, FusedSAEAdam | 310 ± 31.0 | 19x | 11x | 111 | 4.00 | 64.5 % | 1.50e-07 | ok |
| gpt2-small-16k | fp32 | sae-lens 6.54.12 | 6,200 ± 620 | 0.94x | 0.58x | 1,700 | - | - | 1.50e-07 | ok |

![whole step: medians by provider](plots/AMD-EPYC-AVX512-bf16-units-2-threads_whole-step.svg)
"""
SCALING = """\
### Scaling with L0

4,096 tokens, d_in 768, d_sae 16,384.

| L0 | dtype | provider | median ± IQR, ms | vs dense eager fp32 | error | match |
| --: | --- | --- | --: | --: | --: | --- |
| 512 | fp32 | dense eager fp32 | 90.0 ± 9.00 | 1.0x | - | - |
| 512 | fp32 | fused fp32 | 30.0 ± 3.00 | 3.0x | - | - |
| 2,048 | fp32 | dense eager fp32 | 91.0 ± 9.10 | 1.0x | - | - |
| 2,048 | fp32 | fused fp32 | 80.0 ± 8.00 | 1.1x | - | - |

![scaling with L0: medians by provider](plots/AMD-EPYC-AVX512-bf16-units-2-threads_scaling-with-L0.svg)
"""
BLOCK = """\
|  | a training step | fastsae vs it | peak MiB |
| --- | --: | --: | --: |
| **fastsae**, `fused, FusedSAEAdam` | 310 ms | - | 111 |
| dense PyTorch, eager | 5,850 ms | 19x | 1,680 |
| dense PyTorch, `torch.compile` | 3,570 ms | 11x | 544 |
| dense PyTorch in bf16, `torch.compile` | skipped: torch.compile needs a C++ compiler | - | - |
| sae-lens 6.54.12 | 6,200 ms | 20x | 1,700 |

![whole step: medians by provider](benchmarks/plots/AMD-EPYC-AVX512-bf16-units-2-threads_whole-step.svg)

A step of 4,096 tokens, d_in 768, d_sae 16,384, L0 78 on AMD EPYC (AVX512, bf16 units, 2 threads); torch 2.13.0+cpu; commit \
abc1234, 2026-11-23 ([result](benchmarks/results/cpu.json)).
"""


@pytest.fixture
def result(bench: Any, content: dict[str, Any]) -> Result:
    bench.add(content)
    return newest_of_each_machine(bench.folder / "results")[0]


def on_gpu(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "machine": {**content["machine"], "gpu": "NVIDIA H200", "cuda": "13.0"}}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5849, "5,850"),
        (310.25, "310"),
        (0.58, "0.580"),
        (99.96, "100"),
        (1e-5, "0.0000100"),
        (0, "0.00"),
        (1e6, "1,000,000"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(18.75, "19x"), (4.08, "4.1x"), (0.914, "0.91x"), (9.96, "10x"), (118.2, "118x"), (0.999, "1.0x"), (None, "-")],
)
def test_ratios(ratio: float | None, text: str) -> None:
    assert times_as_fast(ratio) == text


def test_sizes_are_never_rounded() -> None:
    assert plain(1048576) == "1,048,576"
    assert plain(12.5) == "12.5"


def test_tables_to_the_letter(result: Result) -> None:
    assert operation_section(result, "whole step") == WHOLE_STEP
    assert operation_section(result, "scaling with L0") == SCALING


def test_readme_block_to_the_letter(result: Result) -> None:
    assert readme_block([result], "benchmarks") == BLOCK


def test_red_rows_say_why_and_have_no_time(result: Result, content: dict[str, Any]) -> None:
    table = operation_section(result, "forward+backward")
    assert (
        "| eai-sparsify 1.3.3 | - | - | - | 3.25e-02 | RED: error 0.033 against fp64, over the limit \\| of 1e-06 |"
        in table
    )


def test_a_time_beside_wrong_numbers_is_not_shown(bench: Any, content: dict[str, Any]) -> None:
    red = next(row for row in content["results"] if row["status"] == "red")
    red.update(median_s=0.123456, iqr_s=0.1, speedup=50.0, error=float("nan"))
    bench.add(content)
    assert bench.report("--check")[0] == 1
    text = benchmarks_readme(newest_of_each_machine(bench.folder / "results"))
    assert "123" not in text.replace("1.23 TFLOP/s", "").replace("abc1234", "")
    assert "| nan | RED: " in text


def test_a_reason_of_many_lines_is_cut(bench: Any, content: dict[str, Any]) -> None:
    content["results"][2]["reason"] = "word\n" * 100
    bench.add(content)
    line = next(
        line for line in benchmarks_readme(newest_of_each_machine(bench.folder / "results")).splitlines() if "…" in line
    )
    assert "skipped: word word" in line
    assert len(line) < 300


def test_several_baselines_are_several_tables(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    bf16 = {"dtype": "bf16", "baseline": "dense eager bf16", "group": "whole step in bf16"}
    content["results"] += [
        make_row("whole step", "dense eager bf16", 20, **bf16),
        make_row("whole step", "fused bf16", 5, **bf16),
    ]
    bench.add(content)
    table = operation_section(newest_of_each_machine(bench.folder / "results")[0], "whole step")
    assert table.count("| vs dense eager fp32 |") == 1
    assert table.count("| vs dense eager bf16 |") == 1
    assert "| fused bf16 | 5.00 ± 0.500 | 4.0x |" in table


def test_where_dense_wins(result: Result) -> None:
    text = where_dense_wins(result)
    assert "| encode, small | fp32 | 0.0078 | dense, threshold | 0.561 | fused | 0.600 | 0.94x |" in text
    assert text.count("\n| ") == 3, "whole step and forward+backward are won; the product alone is no rival"
    assert "at most 0.125 on a CPU and 0.006 on a GPU" in text


def test_dense_in_bf16_is_no_rival_of_fp32(bench: Any, content: dict[str, Any]) -> None:
    compiled = next(row for row in content["results"] if row["group"].startswith("forward") and row["dtype"] == "bf16")
    compiled["median_s"] = 1e-3
    bench.add(content)
    assert "forward+backward" not in where_dense_wins(newest_of_each_machine(bench.folder / "results")[0])


def test_other_libraries_and_our_dense_path_can_win(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    next(row for row in content["results"] if row["provider"].startswith("sae-lens")).update(median_s=0.2, iqr_s=0.02)
    content["results"].append(make_row("whole step", "dense in tiles fp32", 300))
    bench.add(content)
    text = where_dense_wins(newest_of_each_machine(bench.folder / "results")[0])
    assert "| sae-lens 6.54.12 | 200 | fused, FusedSAEAdam | 310 | 0.64x |" in text
    assert "| dense in tiles fp32 | 300 | fused, FusedSAEAdam | 310 | 0.97x |" in text


def test_dense_wins_where_no_fused_provider_is_right(bench: Any, content: dict[str, Any]) -> None:
    fused = next(row for row in content["results"] if row["provider"] == "fused, FusedSAEAdam")
    fused.update(status="red", reason="error 1 over 1e-6", error=1.0)
    bench.add(content)
    results = newest_of_each_machine(bench.folder / "results")
    assert "| dense compiled fp32 | 3,570 | fused, FusedSAEAdam (red) | - | - |" in where_dense_wins(results[0])
    block = readme_block(results, "benchmarks")
    assert "| `fused, FusedSAEAdam` | RED: error 1 over 1e-6 | - | 111 |" in block
    assert "| dense PyTorch, eager | 5,850 ms | - | 1,680 |" in block
    assert figures(results)["step"] is None


def test_dense_wins_nowhere(bench: Any, content: dict[str, Any]) -> None:
    content["results"] = content["results"][:5]
    bench.add(content)
    assert "Nowhere: in every group" in where_dense_wins(newest_of_each_machine(bench.folder / "results")[0])


def test_a_gpu_comes_first_in_the_readme_and_is_never_estimated(bench: Any, content: dict[str, Any]) -> None:
    bench.add(content)
    without = newest_of_each_machine(bench.folder / "results")
    assert "## GPU\n\nGPU: not measured." in benchmarks_readme(without)
    bench.add(on_gpu(content), "gpu.json")
    both = newest_of_each_machine(bench.folder / "results")
    assert "not measured" not in benchmarks_readme(both)
    assert "## GPU: NVIDIA H200" in benchmarks_readme(both)
    block = readme_block(both, "benchmarks")
    assert "on NVIDIA H200; torch" in block


def test_figures_of_the_readme(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    times = {"dense eager fp32": 120.0, "dense compiled bf16": 30.0, "fused fp32": 100.0, "fused bf16": 60.0}
    shape = {"shape": "gpt2-small-16k, half active", "n_tokens": 512, "l0": 8192}
    content["results"] += [make_row("forward+backward", name, ms, **shape) for name, ms in times.items()]
    bench.add(content)
    assert figures(newest_of_each_machine(bench.folder / "results")) == {
        "machine": "AMD EPYC (AVX512, bf16 units, 2 threads)",
        "max-density": "12.5 %",
        "cases-that-dense-wins": "2",
        "step": "310 ms",
        "step/peak": "111 MiB",
        "step/dense-eager-fp32": "19x",
        "step/dense-compiled-fp32": "11x",
        "step/dense-compiled-bf16": None,
        "step/sae-lens": "20x",
        "pass": "357 ms",
        "pass/peak": None,
        "pass/dense-eager-fp32": "18x",
        "pass/dense-compiled-bf16": "3.6x",
        "pass/eai-sparsify": None,
        "half-active/dense-eager-fp32": "1.2x",
        "half-active/dense-compiled-bf16": "0.50x",
    }


def test_the_plain_fused_step_is_the_headline(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    content["results"].append(make_row("whole step", "fused fp32", 320))
    bench.add(content)
    assert "| **fastsae**, `fused fp32` | 320 ms |" in readme_block(
        newest_of_each_machine(bench.folder / "results"), "b"
    )


def test_every_ratio_is_to_the_better_setting_of_the_allocator(bench: Any, content: dict[str, Any]) -> None:
    """As a run writes it: the median is the better one, of the other there is the median alone."""
    rows = {row["provider"]: row for row in content["results"] if row["operation"] == "whole step"}
    rows["dense eager fp32"].update(median_s=3.1, iqr_s=0.1, allocator="tuned", other_median_s=5.849)
    rows["dense compiled fp32"].update(allocator="default", other_median_s=3.6)
    rows["fused, FusedSAEAdam"]["speedup"] = 10.0
    bench.add(content)
    results = newest_of_each_machine(bench.folder / "results")
    block = readme_block(results, "b")
    assert "| fastsae vs it | peak MiB | with glibc's default allocator |" in block
    assert "| dense PyTorch, eager | 3,100 ms | 10x | 1,680 | 5,850 ms |" in block
    assert "| dense PyTorch, `torch.compile` | 3,570 ms | 11x | 544 | 3,570 ms |" in block
    assert "| sae-lens 6.54.12 | 6,200 ms | 20x | 1,700 | - |" in block
    table = operation_section(results[0], "whole step")
    assert "| median ± IQR, ms | allocator | under the other, ms |" in table
    assert "| dense eager fp32 | 3,100 ± 100 | tuned | 5,850 | 1.0x |" in table
    assert figures(results)["step/dense-eager-fp32"] == "10x"


def test_no_claim_rests_on_an_unsteady_row(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    """One whose IQR exceeds half of its median: it is marked, has no ratio, and is not compared with anything."""
    eager, fused = make_row("encode", "dense eager fp32", 20), make_row("encode", "fused fp32", 30, speedup=0.67)
    content["results"] = [*content["results"][:5], eager, {**fused, "iqr_s": 0.016}]
    content["results"][0]["iqr_s"] = 3.0
    bench.add(content, "first.json")
    bench.add({**content, "finished": "2026-11-23T18:00:00Z"}, "second.json")
    results = newest_of_each_machine(bench.folder / "results")
    assert "| dense PyTorch, eager | 5,850 ms (unsteady) | - | 1,680 |" in readme_block(results, "b")
    assert "| fused fp32 | 30.0 ± 16.0 (unsteady) | - |" in operation_section(results[0], "encode")
    dense = where_dense_wins(results[0])
    assert dense.startswith("### Where dense wins\n\nNowhere")
    assert "Left out, as everywhere: 2 unsteady rows." in dense
    assert "| all | 4 of 4 |" in benchmarks_readme(results)


def test_no_headline_no_claim(bench: Any, content: dict[str, Any]) -> None:
    content["results"] = [row for row in content["results"] if row["operation"] != "whole step"]
    bench.add(content)
    assert readme_block(newest_of_each_machine(bench.folder / "results"), "b").startswith(
        "No result file has a whole step at"
    )


def test_names_with_several_sizes_carry_them(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    content["results"].append(
        make_row("encode", "fused", 1, shape="small", n_tokens=128, group="encode, large", baseline=None)
    )
    bench.add(content)
    table = operation_section(newest_of_each_machine(bench.folder / "results")[0], "encode")
    assert "| small (cut): 64 tokens, d_in 512, d_sae 4,096, L0 32 |" in table
    assert "| small: 128 tokens, d_in 768, d_sae 16,384, L0 78 |" in table


def test_two_runs_of_one_commit(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    """The first median is 10 ms off at an IQR of 20, the second 35; the ratio is 1.0 off at an IQR of 0.5."""
    eager = make_row("whole step", "dense eager fp32", 200, speedup=1.0)
    rows = [eager, make_row("whole step", "fused fp32", 100, speedup=2.0, speedup_iqr=0.5)]
    content["results"] = rows
    bench.add(content, "first.json")
    again = [{**eager, "median_s": 0.21}, {**rows[1], "median_s": 0.135, "speedup": 3.0}]
    bench.add({**content, "results": again, "finished": "2026-11-23T18:00:00Z"}, "second.json")
    (found,) = newest_of_each_machine(bench.folder / "results")
    section = benchmarks_readme([found]).partition("### Two runs")[2]
    assert "[first.json](results/first.json)" in section
    assert "| whole step | 1 of 2 | 20 % | 10 % | 0 of 1 | 50 % | 25 % |" in section
    assert "| all | 1 of 2 | 20 % | 10 % | 0 of 1 | 50 % | 25 % |" in section
    apart = section.partition("Those that do not agree:")[2]
    assert apart.count("whole step, gpt2-small-16k") == 2
    assert "| fused fp32 | median | 135 ms | 100 ms | 10.0 ms |" in apart
    assert "| fused fp32 | ratio | 3.00x | 2.00x | 0.500x |" in apart


def test_runs_of_two_commits_are_not_compared(bench: Any, content: dict[str, Any]) -> None:
    bench.add({**content, "commit": "other"}, "first.json")
    bench.add({**content, "finished": "2026-11-23T18:00:00Z"}, "second.json")
    assert "Two runs" not in benchmarks_readme(newest_of_each_machine(bench.folder / "results"))


def test_clocks_of_the_groups(bench: Any, content: dict[str, Any]) -> None:
    content["machine"]["clock_mhz"] = 1500
    content["results"][0]["clock_mhz"], content["results"][1]["clock_mhz"] = 1600.2, 1980
    bench.add(content)
    assert "1,600 to 1,980 MHz" in benchmarks_readme(newest_of_each_machine(bench.folder / "results"))
