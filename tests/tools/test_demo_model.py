"""The build of the demo model makes a whole folder, and the shipped model is what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastsae.data import demo

transformers = pytest.importorskip("transformers")

from tools.demo_model import build, measure  # noqa: E402 (it imports transformers)


def test_model_is_small_loads_and_knows_the_language():
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_path())
    files = [path for path in demo.model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.model_path()).float().eval()
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    sequences = measure.tokenize(tokenizer, demo.load_dialogues()[-24:])
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([sequences[0]])).logits).all()
    loss = math.log(measure.perplexity(model, sequences))
    assert loss < 4.0  # uniform: log(4096) = 8.3
    report = json.loads((demo.model_path() / "training_report.json").read_text())
    assert len(report["samples"]) == 6
    assert report["perplexity"] < math.exp(4.0)


def test_shipped_readme_names_the_command_that_builds_it() -> None:
    command = "Trained from scratch by `python -m tools.demo_model` in "
    assert command in (demo.model_path() / "README.md").read_text()
    assert command in measure.README
    assert (Path(build.__file__).parent / "__main__.py").is_file()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the build needs torch 2.9")
def test_build_trains_a_whole_folder_and_replaces_the_old_one(tmp_path, monkeypatch):
    dialogues = demo.load_dialogues(160)
    monkeypatch.setattr(demo, "load_dialogues", lambda: dialogues)
    monkeypatch.setattr(demo, "HELD_OUT", 8)
    out = tmp_path / "model"
    out.mkdir()
    (out / "old").write_text("")
    report = build.build(out, minutes=0.005, seed=1)
    assert not (out / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert json.loads((out / "training_report.json").read_text()) == report
    assert (report["seed"], report["held_out"], report["dialogues"]) == (1, 8, 152)
    assert report["tokens_seen"] > 0
    assert math.isfinite(report["perplexity"])
    assert [n["layer"] for n in report["residual_norms"]] == list(range(6))
    assert "Qwen2" in (out / "README.md").read_text()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the build needs torch 2.9")
@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--out", "."], ["--unknown"]])
def test_build_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        build.main(arguments)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err or arguments[0] != "--minutes"
