"""The tables from a small result, to the letter; red and skipped rows; where dense wins."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.headline import readme_block
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
A training step (4,096 tokens, d_in 768, d_sae 16,384, L0 78, fp32; forward, loss, backward and Adam) takes **310 ms** on \
AMD EPYC (AVX512, bf16 units, 2 threads), **19x** as fast as eager dense PyTorch and **11x** as fast as the same under \
`torch.compile`, its numbers compared with fp64 before it is timed.

|  | whole step | fastsae vs it | forward + backward | fastsae vs it | peak MiB of a step | match |
| --- | --: | --: | --: | --: | --: | --- |
| **fastsae**, `fused, FusedSAEAdam` | 310 ms | - | 357 ms | - | 111 | ok |
| dense PyTorch, eager | 5,850 ms | 19x | 6,480 ms | 18x | 1,680 | ok |
| dense PyTorch, `torch.compile` | 3,570 ms | 11x | - | - | 544 | ok |
| dense PyTorch in bf16, `torch.compile` | - | - | 1,270 ms | 3.6x | - | whole step skipped: torch.compile needs a C++ compiler |
| sae-lens 6.54.12 | 6,200 ms | 20x | - | - | 1,700 | ok |
| eai-sparsify 1.3.3 | - | - | - | - | - | RED: error 0.033 against fp64, over the limit \\| of 1e-06 |

![whole step: medians by provider](benchmarks/plots/AMD-EPYC-AVX512-bf16-units-2-threads_whole-step.svg)

Measured on AMD EPYC (AVX512, bf16 units, 2 threads), copies 31.2 GB/s, products 0.200 TFLOP/s in fp32 and 1.23 TFLOP/s in \
bf16; Python 3.11.7, torch 2.13.0+cpu, Triton 3.9.0; commit abc1234, 2026-11-23, 412 s in all. By \
`python -m benchmarks.report` from its [result](benchmarks/results/cpu.json). All operations and shapes, and where dense \
wins: [benchmarks/README.md](benchmarks/README.md). GPU: not measured.

**When not to use this.** Where many features fire, products win: from 12.5 % of `d_sae` on the ops take the dense path by \
themselves, in tiles. With few tokens in a step there is less to save. Dense PyTorch or a peer is the faster one in 1 case \
([where dense wins](benchmarks/README.md#where-dense-wins)). If your code needs every activation as a dense tensor anyway, \
there is nothing to save.
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
    next(row for row in content["results"] if row["provider"].startswith("sae-lens"))["median_s"] = 0.2
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
    assert block.startswith("No claim: no fused provider of a training step")
    assert "| `fused, FusedSAEAdam` | - | - | - | - | - | RED: error 1 over 1e-6 |" in block


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
    assert "on NVIDIA H200, **19x**" in block
    assert "not measured" not in block


def test_the_readme_says_how_much_is_left_where_there_is_little_to_save(
    bench: Any, content: dict[str, Any], make_row: Any
) -> None:
    times = {"dense eager fp32": 120.0, "dense compiled bf16": 30.0, "fused fp32": 100.0, "fused bf16": 60.0}
    shape = {"shape": "gpt2-small-16k, half active", "n_tokens": 512, "l0": 8192}
    content["results"] += [make_row("forward+backward", name, ms, **shape) for name, ms in times.items()]
    bench.add(content)
    block = readme_block(newest_of_each_machine(bench.folder / "results"), "b")
    figures = "1.2x as fast as eager in fp32 and 0.50x as fast as `torch.compile` in bf16"
    assert f"there: 512 tokens, d_in 768, d_sae 16,384, L0 8,192: {figures}. Dense PyTorch or a peer" in block


def test_the_plain_fused_step_is_the_headline(bench: Any, content: dict[str, Any], make_row: Any) -> None:
    content["results"].append(make_row("whole step", "fused fp32", 320))
    bench.add(content)
    assert "takes **320 ms**" in readme_block(newest_of_each_machine(bench.folder / "results"), "b")


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
    assert "agrees, within the IQRs, in 1 of 2 medians and 0 of 1 ratios. By" in readme_block([found], "b")


def test_runs_of_two_commits_are_not_compared(bench: Any, content: dict[str, Any]) -> None:
    bench.add({**content, "commit": "other"}, "first.json")
    bench.add({**content, "finished": "2026-11-23T18:00:00Z"}, "second.json")
    assert "Two runs" not in benchmarks_readme(newest_of_each_machine(bench.folder / "results"))


def test_clocks_of_the_groups(bench: Any, content: dict[str, Any]) -> None:
    content["machine"]["clock_mhz"] = 1500
    content["results"][0]["clock_mhz"], content["results"][1]["clock_mhz"] = 1600.2, 1980
    bench.add(content)
    assert "1,600 to 1,980 MHz" in benchmarks_readme(newest_of_each_machine(bench.folder / "results"))
