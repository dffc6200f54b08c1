"""`fastsae steer` from end to end on a tiny model: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fastsae import cli, steer
from fastsae.commands import steer as command
from fastsae.data.tokens import render
from fastsae.interpret.examine import EXAMPLES
from fastsae.interpret.store import ExampleStore
from fastsae.sae import SparseAutoencoder
from fastsae.steering import bench, edits, positions
from fastsae.steering.edits import Edit
from fastsae.steering.options import DYNAMIC
from fastsae.steering.prompted import prompted_rollouts
from fastsae.steering.rollout import Rollout, roll_out
from fastsae.steering.run import PAGE_FILE, RESULT_FILE
from fastsae.steering.twins import NotFiniteError

transformers = pytest.importorskip("transformers")
SHORT = ["--max-new-tokens", "6", "--quiet"]


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with predictions that are sharp, so that a push can change them by more than a nat."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("sharp") / "model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(60)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model_folder: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE as `fastsae train` leaves it, with its examples."""
    folder = tmp_path_factory.mktemp("trained") / "sae"
    options = (
        "--d-sae 32 --tokens 512 --batch-size 64 --buffer-tokens 256 --forward-tokens 256 --eval-dialogues 12 --dedup-words 0 "
        "--init-l0 8 --target-l0 4 --quiet"
    )
    given = ["--model", str(model_folder), "--dataset", str(chats), "--output", str(folder), *options.split()]
    assert cli.main(["train", *given]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "sae"))


@pytest.fixture(scope="module")
def feature(trained: Path) -> int:
    return ExampleStore.load(trained / EXAMPLES).alive(1)[0]


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    found = capsys.readouterr()
    return status, found.out, found.err


def test_a_grid_with_its_controls(
    folder: Path, feature: int, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "What is three plus four?", "--prompt", "Why?"]
    given = ["--alpha", "0,2,40", "--dynamic", "decay,kl-cap,set-point", "--instruction", "Answer in numbers."]
    status, out, err = called(capsys, "steer", folder, "--feature", feature, *prompts, *given, *SHORT)
    assert status == 0, err
    result = json.loads((folder / RESULT_FILE).read_text())
    assert str(folder) not in (folder / RESULT_FILE).read_text()
    assert str(folder.parent) not in (folder / PAGE_FILE).read_text()
    assert "steer.html" in out
    assert f"feature {feature}" in out
    runs = {(run["arm"], run["dose"], run["alpha"]): run for run in result["runs"]}
    arm = f"feature {feature}"
    doses = [(a, "fixed", x) for a in (arm, "random direction") for x in (0, 2, 40)]
    assert {key for key in runs if key[1] == "fixed"} == {
        ("unsteered", "fixed", 0.0), ("prompted", "fixed", 0.0), *doses
    }  # fmt: skip
    plain = runs["unsteered", "fixed", 0.0]
    for a in (arm, "random direction"):
        assert [text["text"] for text in runs[a, "fixed", 0.0]["texts"]] == [text["text"] for text in plain["texts"]]
        assert runs[a, "fixed", 0.0]["mean_kl"] == 0
        assert 0 < runs[a, "fixed", 2.0]["mean_kl"] < runs[a, "fixed", 40.0]["mean_kl"]
    assert result["features"][0]["maximum"] == pytest.approx(
        ExampleStore.load(folder / EXAMPLES).examples(feature).maximum
    )
    reference = next(run["mean_kl"] for key, run in runs.items() if key[:2] == (arm, "fixed") and key[2] == 40.0)
    low = runs[arm, "fixed", 2.0]["mean_kl"]
    dynamic = [run for run in result["runs"] if run["dose"] != "fixed"]
    assert dynamic
    for run in dynamic:  # brought to the mean KL of one of the two doses
        assert min(abs(run["mean_kl"] / target - 1) for target in (reference, low)) < 0.06, run["dose"]
    assert {row["arm"] for row in result["stable"]} == {arm, "random direction"}
    # the written tokens are those of generate() under the same edit
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor([render(tokenizer, [{"role": "user", "content": "Why?"}], add_generation_prompt=True)])
    sae = SparseAutoencoder.load(folder)
    with steer(model, sae, [Edit(feature, "add", 40.0)]):
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(written) == runs[arm, "fixed", 40.0]["texts"][1]["text"]


def test_a_dose_that_is_too_strong_for_the_model_is_left_out(
    folder: Path, feature: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rolled(*arguments: Any, **options: Any) -> list[Rollout]:
        found = roll_out(*arguments, **options)
        if max(abs(kl) for one in found for kl in one.kl) > 1e-3:
            raise NotFiniteError("the model computed NaN")
        return found

    monkeypatch.setattr(bench, "roll_out", rolled)
    given = ["--feature", feature, "--prompt", "Why?", "--alpha", "0,400", "--instruction", "none"]
    status, _, err = called(capsys, "steer", folder, *given, *SHORT)
    assert status == 0
    assert f"feature {feature}, alpha 400 is left out: the model computed NaN" in err
    result = json.loads((folder / RESULT_FILE).read_text())
    assert {(run["arm"], run["alpha"]) for run in result["runs"]} == {
        ("unsteered", 0), (f"feature {feature}", 0), ("random direction", 0)
    }  # fmt: skip


def test_other_modes_have_numbers_and_no_random_direction(
    folder: Path, feature: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["steer", folder, "--feature", feature, "--prompt", "Why?", *SHORT]
    status, _, err = called(
        capsys, *given, "--mode", "clamp", "--alpha", "0,3", "--instruction", "none", "--unit", "max"
    )
    assert status == 0, err
    result = json.loads((folder / RESULT_FILE).read_text())
    assert {run["arm"] for run in result["runs"]} == {"unsteered", f"feature {feature}"}
    assert {run["dose"] for run in result["runs"]} == {"fixed"}
    status, _, err = called(capsys, *given, "--mode", "ablate")
    assert (status, "alpha: expected numbers for the mode ablate" in err) == (2, True)
    status, _, err = called(capsys, *given, "--mode", "scale", "--alpha", "2", "--dynamic", "decay")
    assert (status, "dynamic: expected none for the mode scale" in err) == (2, True)


def test_auto_finds_a_strength_and_selection_finds_a_feature(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(capsys, "steer", folder, "--dynamic", "none", *SHORT)
    assert status == 0, err
    result = json.loads((folder / RESULT_FILE).read_text())
    assert result["auto"]["p95_kl"] == pytest.approx(1, abs=0.06)
    assert [run["alpha"] / result["auto"]["alpha"] for run in result["runs"] if run["arm"].startswith("feature")] == (
        pytest.approx([0, 0.125, 0.25, 0.5, 1, 2, 4])
    )
    assert result["features"][0]["chosen_by"].startswith("strongest at ")
    assert len(result["prompts"]) == 3
    assert "alpha auto" in out
    for how in ("output-score", "number"):
        status, _, err = called(
            capsys, "steer", folder, "--select", how, "--top", 2, "--alpha", "1", "--dynamic", "none", *SHORT
        )
        assert status == 0, err
        assert len(json.loads((folder / RESULT_FILE).read_text())["features"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--feature", "32"], "--feature: expected 0 to 31"),
        (["--alpha", "nan"], "alpha: expected finite numbers, got nan"),
        (["--alpha", "much"], "argument --alpha: expected numbers with commas between them, paper or auto, got 'much'"),
        (["--alpha", "1,1"], "alpha: expected each dose once"),
        (["--dynamic", "wild"], "dynamic: expected some of decay, kl_cap, set_point, got 'wild'"),
        (["--prompt", " "], "prompt: expected at least one that says something"),
        (["--alpha", "1", "--max-new-tokens", "5000"], "max_new_tokens: expected at most"),
        (["--unit", "max", "--dynamic", "set_point"], "dynamic: expected set_point with the unit absolute"),
    ],
)
def test_what_is_refused(given: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = called(capsys, "steer", folder, "--quiet", *given)
    assert status == 2, err
    assert message in err
    assert not (folder / RESULT_FILE).exists()


def test_the_command_knows_every_choice_without_importing_torch() -> None:
    assert get_args(edits.Mode) == command.MODES
    assert get_args(edits.Unit) == command.UNITS
    assert positions.POSITIONS == command.POSITIONS
    assert DYNAMIC == command.DYNAMIC


def test_prompted_texts_are_measured_beside_the_prompt_alone(tiny_model: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    prompts, asked = [[5, 6, 7], [8, 9]], [[5, 6, 7, 20, 21], [8, 9, 22]]
    written = roll_out(model, tokenizer, asked, None, max_new_tokens=4)
    found = prompted_rollouts(model, asked, prompts, written)
    for one, prompt, words in zip(found, prompts, asked, strict=True):
        for t, token in enumerate(one.token_ids):
            p, q = (
                model(torch.tensor([[*begin, *one.token_ids[:t]]])).logits[0, -1].detach().double().log_softmax(-1)
                for begin in (words, prompt)
            )
            assert one.kl[t] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)
            assert one.surprise[t] == pytest.approx(-float(q[token]), rel=1e-4)
