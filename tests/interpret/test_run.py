"""`fastsae interpret` and `fastsae pages` from end to end on a tiny model: what they write, keep, print and refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FusedTopKSAE, cli
from fastsae.commands.interpret import _names
from fastsae.errors import UsageError
from fastsae.interpret import examine, run
from fastsae.interpret.store import ExampleStore

SCORES = "detection,intruder"  # the judge below can answer these


class Peak:
    """Knows of a window only how many of its tokens are those that fire in the windows it has learnt from."""

    name = "peak"

    def __init__(self, tokenizer: Any) -> None:
        self.asked = 0

    def facts(self) -> dict[str, Any]:
        return {"knows": "tokens"}

    def rate(self, tasks: Any) -> list[Any]:
        raise AssertionError("not asked for")

    def detect(self, tasks: Any) -> list[list[float | None]]:
        self.asked += len(tasks)
        return [[self._share(task.evidence.firing, window) for window in task.windows] for task in tasks]

    def find_intruder(self, tasks: Any) -> list[int | None]:
        return [min(range(len(windows)), key=lambda i: windows[i].value) for windows in tasks]

    @staticmethod
    def _share(learnt: Any, window: Any) -> float:
        firing = {window.tokens[window.peak] for window in learnt}
        return float(any(token in firing for token in window.tokens))


@pytest.fixture(scope="module")
def trained(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE as `fastsae train` leaves it, with its page."""
    folder = tmp_path_factory.mktemp("trained") / "sae"
    options = (
        "--d-sae 32 --tokens 512 --batch-size 64 --buffer-tokens 256 --forward-tokens 256 --eval-dialogues 12 --dedup-words 0 "
        "--init-l0 8 --target-l0 4 --quiet"
    )
    given = ["--model", str(tiny_model), "--dataset", str(chats), "--output", str(folder), *options.split()]
    assert cli.main(["train", *given]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "sae"))


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.interpret.judges.judge_maker", lambda *_, **__: Peak)


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    found = capsys.readouterr()
    return status, found.out, found.err


def without_times(path: Path) -> Any:
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}


def test_training_ends_with_a_page(trained: Path) -> None:
    assert "<title>Features of sae</title>" in (trained / run.PAGE_FILE).read_text()
    store = ExampleStore.load(trained / examine.EXAMPLES)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert store.n_tokens == metrics["tokens_evaluated"] - metrics["sinks"]
    assert store.counts.sum().item() / store.n_tokens == pytest.approx(metrics["l0"])


@pytest.mark.usefixtures("judge")
def test_scores_are_a_function_of_the_seed_and_examples_are_read_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / examine.EXAMPLES / "examples.json").stat().st_mtime_ns
    status, out, _ = called(capsys, "interpret", folder, "--features", 6, "--scores", SCORES, "--quiet")
    assert status == 0
    assert re.search(r"intruder found +\d", out)
    assert "by chance" in out
    result = json.loads((folder / run.RESULT_FILE).read_text())
    assert result["judge"] == {"name": "peak", "knows": "tokens"}
    (found,) = result["saes"].values()
    assert len(found["features"]) == 6
    assert found["training_seed"] == 42
    assert str(folder) not in (folder / run.RESULT_FILE).read_text()
    shutil.copy(folder / run.RESULT_FILE, folder / "first.json")
    assert called(capsys, "interpret", folder, "--features", 6, "--scores", SCORES, "--quiet")[0] == 0
    assert without_times(folder / run.RESULT_FILE) == without_times(folder / "first.json")
    assert (folder / examine.EXAMPLES / "examples.json").stat().st_mtime_ns == before
    assert (
        called(capsys, "pages", folder, "--eval-dialogues", 15, "--quiet")[0] == 0
    )  # other data than training left there
    assert ExampleStore.load(folder / examine.EXAMPLES).n_dialogues == 15


@pytest.mark.usefixtures("judge")
def test_two_saes_are_scored_on_the_same_dialogues(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    arguments = ["--features", 4, "--scores", "intruder", "--quiet"]
    status, _, err = called(capsys, "interpret", folder, other, *arguments)
    assert (status, "--output: expected a folder" in err) == (2, True)
    output = tmp_path / "both"
    assert called(capsys, "interpret", folder, other, "--output", output, *arguments)[0] == 0
    saes = json.loads((output / run.RESULT_FILE).read_text())["saes"]
    assert list(saes) == ["sae", "other"]
    assert saes["sae"] == saes["other"]
    assert (output / "other" / run.PAGE_FILE).exists()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eval_dialogues": 9}))
    status, _, err = called(capsys, "interpret", folder, other, "--output", tmp_path / "three", *arguments)
    assert (status, "was held out other dialogues than" in err) == (2, True)


@pytest.mark.usefixtures("judge")
def test_pages_show_what_was_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "interpret", folder, "--features", 3, "--scores", "intruder", "--quiet")[0] == 0
    (folder / run.PAGE_FILE).unlink()
    status, out, _ = called(capsys, "pages", folder, "--features", 5, "--quiet")
    assert (status, out) == (0, f"page     {folder / run.PAGE_FILE}\n")
    assert (folder / run.PAGE_FILE).exists()
    (folder / run.RESULT_FILE).write_text('{"saes": {"sae": 1}}')
    status, _, err = called(capsys, "pages", folder, "--quiet")
    assert (status, "got a damaged file" in err) == (1, True)


def test_bad_input_is_one_message(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ExampleStore.load(folder / examine.EXAMPLES)
    dead = (store.counts == 0).nonzero()[:, 0].tolist()
    narrow = tmp_path / "narrow"
    FusedTopKSAE(8, 32, k=4).save(narrow)
    shutil.copy(folder / "config.json", narrow)
    cases = [
        (["pages", folder, "--feature", 32], "feature 32: expected 0 to 31"),
        (["pages", narrow], "expected activations of the SAE's width d_in = 8, got 16"),
        (["pages", folder, folder, "--output", tmp_path / "x"], "one of them twice"),
        (["interpret", folder, "--scores", "taste"], "scores: expected some of"),
        (["interpret", folder, "--judge", "oracle"], "judge: expected"),
        (["interpret", folder, "--features", 0], "--features: expected at least 1"),
        (["interpret", folder, "--dry-run"], "--dry-run: expected a judge behind an endpoint"),
        (["pages", tmp_path / "nothing"], "nothing"),
    ]
    cases += [(["pages", folder, "--feature", feature], "fires on none of the") for feature in dead[:1]]
    for arguments, text in cases:
        status, out, err = called(capsys, *arguments, "--quiet")
        assert (status, out) == (2, ""), arguments
        assert text in err, (arguments, err)
        assert "Traceback" not in err


def test_an_sae_whose_features_are_all_silent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastsae import SparseAutoencoder

    sae = SparseAutoencoder.load(folder)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    sae.save(folder)
    status, _, err = called(capsys, "pages", folder, "--quiet", "--output", folder.parent / "silent")
    assert (status, "fire" in err) == (2, True)


def test_names_tell_saes_apart() -> None:
    assert _names(["runs/fast/a", "runs/bt-f/b"]) == ["a", "b"]
    assert _names(["runs/fast/seed-0", "runs/bt-f/seed-0"]) == ["fast-seed-0", "bt-f-seed-0"]
    with pytest.raises(UsageError, match="twice"):
        _names(["a", "a"])
