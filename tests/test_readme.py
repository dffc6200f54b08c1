"""The README's Python blocks run as they stand, in order, in one session."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FusedJumpReLUSAE

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number}", "exec"), names)


def test_the_run_on_objects_in_hand_works(tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With a tiny model, so another layer, and fewer tokens."""
    from fastsae.data.language_model import load_model

    (block,) = re.findall(
        r"```text\n(from fastsae.train import.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    block, n_changed = re.subn(r"layer=\d+, tokens=[\d_]+, batch_size=\d+", "layer=1, tokens=256, batch_size=64", block)
    assert n_changed == 1
    model, tokenizer = load_model(str(tiny_model))
    dialogues = (json.loads(line)["messages"] for line in chats.read_text().splitlines())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "dialogues": dialogues}
    exec(block, names)
    assert names["metrics"]["tokens"] == 256


def test_the_lines_on_steering_work(tiny_model: Path) -> None:
    from fastsae import FusedTopKSAE
    from fastsae.data.language_model import load_model

    (block,) = re.findall(r"```text\n(import fastsae\n.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    block, n_changed = re.subn(r"Edit\(\d+,", "Edit(3,", block)
    assert n_changed == 1
    model, tokenizer = load_model(str(tiny_model))
    sae = FusedTopKSAE(16, 32, k=4)
    sae.metadata["hook_name"] = "blocks.1.hook_resid_post"
    inputs = {**tokenizer("What is this?", return_tensors="pt"), "max_new_tokens": 3}
    names: dict[str, Any] = {"model": model, "sae": sae, "inputs": inputs}
    exec(block, names)
    assert names["output"].shape[1] <= inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("number", [0, 1])
def test_both_sides_of_a_diff_give_the_same(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install sae-lens)")
    diff = re.findall(r"```diff\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[number]
    monkeypatch.chdir(tmp_path)
    sae = FusedJumpReLUSAE(16, 64)
    sae.b_enc.data.uniform_(-0.1, 0.1)
    sae.save("my-sae")
    x = torch.randn(3, 5, 16)
    sides = []
    for other in "+-":
        names: dict[str, torch.Tensor] = {"x": x}
        exec("\n".join(line[1:] for line in diff.splitlines() if not line.startswith(other)), names)
        sides.append([names["feature_acts"], names["sae_out"]])
    torch.testing.assert_close(sides[0], sides[1])


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
