"""Every script of `examples/` runs, at small sizes, where the library that it is about is installed."""

from __future__ import annotations

import json
import runpy
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = "--d-in 32 --d-sae 256 --k 8 --tokens 64 --steps 2"
SCRIPTS = {  # the module that must be installed, and arguments
    "saelens_training": ("sae_lens", SMALL),
    "saelens_inference": ("sae_lens", "--d-in 32 --d-sae 512 --tokens 64"),
    "dictionary_learning_training": ("dictionary_learning", SMALL),
    "sparsify_training": ("sparsify", "--d-in 32 --latents 256 --k 8 --context 16 --sequences 2 --steps 2"),
}


@pytest.fixture(autouse=True)
def process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    sys.modules.pop("common", None)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_grad_enabled(True)


def run(script: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments.split()])
    return runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")


def test_every_script_is_tried_here() -> None:
    named = {*SCRIPTS, "convert", "saelens_command_line", "smollm2_data", "common"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == named


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module, arguments = SCRIPTS[script]
    pytest.importorskip(module)
    run(script, arguments, monkeypatch)
    printed = capsys.readouterr().out
    assert "times as fast" in printed
    assert "calls on the fused ops" in printed
    assert "calls left to the peer" not in printed
    difference = printed.partition("largest difference of the results: ")[2].split()[0]
    assert float(difference) < 1e-4


def test_converting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("convert", "--d-in 16 --d-sae 64", monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("largest difference 0\n") == 2
    assert "FusedJumpReLUSAE" in printed


def test_the_data_of_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def record(*said: tuple[str, str]) -> dict[str, Any]:
        return {"conversations": [{"from": who, "value": text} for who, text in said]}

    good = record(("human", "Hi"), ("gpt", "Hello"), ("human", "and then?"))  # without the last question
    others = [
        record(("gpt", "Hello")),
        record(("human", "Hi"), ("human", "Hi")),
        record(("human", "ほげ"), ("gpt", "ふが")),
    ]
    others.append(record(("human", "Hi"), ("gpt", "long " * 2000)))
    text = json.dumps([good, *others, good])
    with zipfile.ZipFile(tmp_path / "chats.whl", "w") as archive:
        archive.writestr("package/chats.json", text[: text.rindex("and then?")])  # cut off, as the package's file is
    corpora = tmp_path / "packages" / "corpora"
    corpora.mkdir(parents=True)
    for name in ("abc", "inaugural", "state_union", "webtext"):
        with zipfile.ZipFile(corpora / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/README", "not this")
            archive.writestr(f"{name}/a.txt", "A line of text.\n" * 300)
    run("smollm2_data", f"{tmp_path / 'chats.whl'} {tmp_path} {tmp_path / 'out'}", monkeypatch)
    chats = (tmp_path / "out" / "chats.jsonl").read_text().splitlines()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert [json.loads(row) for row in chats] == [{"messages": messages}]
    texts = [json.loads(row)["text"] for row in (tmp_path / "out" / "text.jsonl").read_text().splitlines()]
    assert len(texts) == 8
    assert "".join(texts) == "A line of text.\n" * 1200


def test_the_command_line_of_saelens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sae_lens")
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"text": f"What is number {i} plus {i * 3} in words, please?" * 4}) for i in range(60)]
    (data / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    arguments = f"""--architecture topk --k 4 --d_in 16 --d_sae 64 --model_class_name AutoModelForCausalLM
        --model_name {tiny_model} --hook_name model.layers.1 --dataset_path {data} --output_path {tmp_path / "sae"}
        --context_size 32 --training_tokens 256 --train_batch_size_tokens 64 --n_batches_in_buffer 4
        --store_batch_size_prompts 4 --prepend_bos False --nolog_to_wandb --noverbose"""
    names = run("saelens_command_line", arguments, monkeypatch)
    names["handle"].undo()
    assert names["handle"].tally.fused == {"training_forward_pass": 4, "_train_step": 4}
    assert not names["handle"].tally.left
    assert "calls on the fused ops" in capsys.readouterr().out
    assert (tmp_path / "sae" / "sae_weights.safetensors").is_file()
