"""Which files count, and one clear line for each that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.result import ReportError, newest_of_each_machine, read


def changed(content: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**content, **values}


def failure(bench: Any, content: Any) -> str:
    path = bench.add(content)
    with pytest.raises(ReportError) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_newest_by_date_then_by_time(bench: Any, content: dict[str, Any]) -> None:
    bench.add(changed(content, commit="late", finished="2026-11-23T18:00:00Z"), "a.json")
    bench.add(content, "b.json")
    bench.add(changed(content, commit="old", date="2026-11-22", finished="2026-11-24T00:00:00"), "c.json")
    (found,) = newest_of_each_machine(bench.folder / "results")
    assert found.commit == "late"


def test_one_result_for_each_machine(bench: Any, content: dict[str, Any]) -> None:
    bench.add(content, "a.json")
    bench.add(changed(content, machine={**content["machine"], "threads": 16}), "b.json")
    bench.add(changed(content, machine={**content["machine"], "gpu": "NVIDIA H200"}), "c.json")
    names = [result.machine.slug for result in newest_of_each_machine(bench.folder / "results")]
    assert names == ["NVIDIA-H200", "AMD-EPYC-AVX512-bf16-units-16-threads", "AMD-EPYC-AVX512-bf16-units-2-threads"]


def test_keys_that_may_be_missing(bench: Any, content: dict[str, Any]) -> None:
    for key in ("triton", "cuda", "gpu", "copy_gb_per_s", "gemm_tflop_per_s"):
        del content["machine"][key]
    for row in content["results"]:
        for key in ("peak_mib", "floor_s", "iqr_s", "speedup", "reason", "error", "error_limit", "baseline", "is_cut"):
            row.pop(key, None)
    bench.add(content)
    printed = bench.report("--check")[1]
    assert "README.md differs" in printed
    assert "error" not in printed


def test_an_operation_that_is_not_known_has_its_own_table_at_the_end(bench: Any, content: dict[str, Any]) -> None:
    content["results"].insert(0, {**content["results"][0], "operation": "latency of encode", "group": "latency"})
    bench.add(content)
    (found,) = newest_of_each_machine(bench.folder / "results")
    assert found.operations()[0] == "whole step"
    assert found.operations()[-1] == "latency of encode"


@pytest.mark.parametrize(
    ("provider", "kind"),
    [
        ("fused, clipped fp32", "fused"),
        ("dense eager, flat torch.topk", "dense"),
        ("embedding_bag", "dense"),
        ("dense in tiles fp32", "tiles"),
        ("sae-lens", "peer"),
        ("eai-sparsify, SignSGD 1.3.3", "peer"),
        ("another 0.1", "peer"),
        ("product alone", "other"),
    ],
)
def test_kinds_of_providers(bench: Any, content: dict[str, Any], provider: str, kind: str) -> None:
    content["results"][0]["provider"] = provider
    (found,) = newest_of_each_machine(bench.add(content).parent)
    assert found.rows[0].kind == kind


@pytest.mark.parametrize("key", ["machine", "commit", "date", "finished", "seconds", "results"])
def test_missing_key_of_the_file(bench: Any, content: dict[str, Any], key: str) -> None:
    del content[key]
    assert f"lacks the key '{key}'" in failure(bench, content)


def test_missing_keys_inside(bench: Any, content: dict[str, Any]) -> None:
    machine = {key: value for key, value in content["machine"].items() if key != "torch"}
    assert "'machine' lacks the key 'torch'" in failure(bench, changed(content, machine=machine))
    del content["results"][3]["d_sae"]
    assert "results[3] lacks the key 'd_sae'" in failure(bench, content)


def test_a_file_of_the_old_form(bench: Any) -> None:
    row = {"group": "encode", "provider": "fused", "baseline": None, "error": None, "median_s": 1.0, "speedup": None}
    message = failure(bench, {"machine": {"gpu": None}, "commit": "66f9c16", "results": [row]})
    assert message.endswith("the file lacks the key 'date'; run the benchmarks again, or delete the file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"operation": ""}, "'operation' of results[0] is '', not a name"),
        ({"shape": None}, "'shape' of results[0] is None, not a name"),
        ({"status": "fine"}, "'status' of results[0] is 'fine', not one of ok, red, skipped"),
        ({"median_s": None}, "'median_s' of results[0] is None, though its status is ok"),
        ({"median_s": "fast"}, "'median_s' of results[0] is 'fast', not a number"),
        ({"peak_mib": float("nan")}, "'peak_mib' of results[0] is nan, not a number"),
        ({"error": True}, "'error' of results[0] is True, not a number"),
        ({"d_sae": 0}, "'d_sae' of results[0] is 0, not a number above 0"),
        ({"n_tokens": None}, "'n_tokens' of results[0] is None, not a number above 0"),
        ({"error": 1.0}, "'status' of results[0] is ok, though its error 1.0 is over 3e-07"),
        ({"error": float("nan")}, "'status' of results[0] is ok, though its error nan is over 3e-07"),
        ({"provider": "dense compiled fp32"}, "results[1] is the second row of 'dense compiled fp32' in group"),
    ],
)
def test_impossible_values_of_a_row(bench: Any, content: dict[str, Any], values: dict[str, Any], message: str) -> None:
    content["results"][0].update(values)
    assert message in failure(bench, content)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"date": "yesterday"}, "'date' is 'yesterday', not an ISO date"),
        ({"finished": None}, "'finished' is None, not an ISO datetime"),
        ({"seconds": "long"}, "'seconds' is 'long', not a number"),
        ({"results": {}}, "'results' is not a list of rows"),
        ({"results": [1]}, "results[0] is not an object with keys"),
        ({"machine": None}, "'machine' is not an object with keys"),
    ],
)
def test_impossible_values_of_the_file(
    bench: Any, content: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    assert message in failure(bench, changed(content, **values))


def test_no_json(bench: Any, tmp_path: Path) -> None:
    path = bench.folder / "results" / "broken.json"
    path.write_text("{", encoding="utf-8")
    status, printed = bench.report()
    assert status == 1
    assert f"error: {path}: not JSON (" in printed
    path.write_text(json.dumps([]), encoding="utf-8")
    assert "the file is not an object with keys" in bench.report()[1]


def test_no_files(bench: Any) -> None:
    status, printed = bench.report("--check")
    assert status == 1
    assert f"{bench.folder / 'results'}: no result files; `pytest benchmarks/ --results" in printed


def test_each_commit_that_rows_were_measured_at_is_named(bench: Any, content: dict[str, Any]) -> None:
    content["results"][0]["commit"] = "0ld"
    (found,) = newest_of_each_machine(bench.add(content).parent)
    assert found.commits == f"commits {content['commit']}, 0ld"
