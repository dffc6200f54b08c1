"""What `--resume` takes up: each value of a checkpoint is checked first, and data and model must be those of the start."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FastsaeError, UsageError, cli
from fastsae.train import checkpoint, fingerprint, run
from fastsae.train.config import TrainConfig
from fastsae.train.folder import is_new, located, read_config
from fastsae.train.run import evaluate_folder, train
from fastsae.train.trainer import Trainer

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (pip install hypothesis)")
st = hypothesis.strategies


def make_config(model: Path, chats: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        model=str(model), dataset=str(chats), eval_dialogues=8, d_sae=32, tokens=64 * 12, batch_size=64,
        buffer_tokens=256, forward_tokens=256, init_l0=8, target_l0=4, log_every=4, **options,
    )  # fmt: skip


class Stop(Exception):  # noqa: N818 - what ends the run does not matter
    """Ends a run as an error would."""


def stopped_run(config: TrainConfig, output: Path, at: int) -> Path:
    """A run that ended at a step, with its last checkpoint."""
    step = Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        if self.step == at:
            raise Stop
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Stop):
            train(config, output, progress=False)
    return output


@pytest.fixture(scope="module")
def saved(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[run._Parts, dict[str, Any]]:
    """The parts of a run, and the state of a checkpoint between two points of its curves."""
    config = replace(make_config(tiny_model, chats, checkpoint_every=1), tokens=64 * 160)
    output = stopped_run(config, tmp_path_factory.mktemp("run") / "run", at=7)
    state = checkpoint.load_latest(output)
    assert state is not None
    return run._Parts(read_config(output), run.build_pipeline(config)), state


def changed(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value, found by its dotted path, replaced or made by a function of the old one."""
    state = copy.deepcopy(state)
    *above, last = path.split(".")
    place: Any = state
    for name in above:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value(place[last]) if callable(value) else value
    return state


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


WRONG: list[tuple[str, Any]] = [
    *(("trainer.step", value) for value in (-5, True, 7.0, 161, 10**30, "7", None, [7])),
    *(("trainer.scale", value) for value in (0, -1.0, math.nan, math.inf, True, "1", None)),
    *(("seconds", value) for value in (-1, math.nan, "1", None)),
    ("trainer.silent_tokens", filled(-1)),
    ("trainer.silent_tokens", filled(10**9)),
    ("trainer.silent_tokens", lambda tensor: tensor[:-1]),
    ("trainer.silent_tokens", lambda tensor: tensor.float()),
    ("trainer.dead_mask", torch.ones(5, dtype=torch.bool)),
    ("trainer.dead_mask", torch.ones(32)),
    ("trainer.sae.W_enc", lambda tensor: tensor.t()),
    ("trainer.sae.W_enc", lambda tensor: tensor.double()),
    ("trainer.sae.b_enc", filled(math.nan)),
    ("trainer.sae.b_enc", 3),
    ("trainer.sae.other", torch.zeros(3)),
    ("trainer.sae", {}),
    ("trainer.other", 1),
    ("trainer.optimizer", {}),
    ("trainer.optimizer.9", {}),
    ("trainer.optimizer.0", 1),
    ("trainer.optimizer.0.step", filled(3)),
    ("trainer.optimizer.0.step", filled(math.inf)),
    ("trainer.optimizer.1.exp_avg", lambda tensor: tensor[:1]),
    ("trainer.optimizer.1.exp_avg_sq", filled(-1)),
    ("trainer.optimizer.1.exp_avg_sq", filled(math.inf)),
    ("trainer.sums", {}),
    ("trainer.sums.loss", torch.zeros(2)),
    ("trainer.sums.loss", filled(math.inf)),
    ("trainer.sums.loss", 1.0),
    ("trainer.history", {}),
    ("trainer.history", [1]),
    ("trainer.history", lambda rows: rows + rows),
    ("trainer.history", lambda rows: [{**rows[0], "tokens": 1}]),
    ("trainer.history", lambda rows: [{**rows[0], "loss": None}]),
    ("trainer.history", lambda rows: [{"step": 4, "tokens": 256}]),
    ("buffer.rows", None),
    ("buffer.rows.acts", lambda tensor: tensor[:, :-1]),
    ("buffer.rows.token_ids", lambda tensor: tensor[:-1]),
    ("buffer.rows.acts", filled(math.nan)),
    ("buffer.rows.acts", lambda tensor: tensor.long()),
    ("buffer.rows.dialogue_ids", filled(40)),
    ("buffer.rows.token_ids", filled(-1)),
    ("buffer.rows.positions", lambda tensor: tensor.int()),
    ("buffer.pending", 3),
    ("buffer.to_serve", 10**6),
    ("buffer.to_serve", -1),
    ("buffer.served_any", 1),
    ("buffer.generator", filled(255)),
    ("buffer.generator", lambda tensor: tensor[:-1]),
    ("sequencer.epoch", -1),
    ("sequencer.window", 1),
    ("sequencer.batch", 10**6),
    ("sequencer.batch", 1.0),
    ("sequencer.dropped", -1),
    ("sequencer.other", 0),
    ("sequencer", None),
    ("other", 1),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{i}-{path}" for i, (path, _) in enumerate(WRONG)])
def test_a_wrong_value_is_refused_before_anything_is_used(
    saved: tuple[run._Parts, dict[str, Any]], path: str, value: Any
) -> None:
    parts, state = saved
    before = {name: tensor.clone() for name, tensor in parts.trainer.sae.state_dict().items()}
    with pytest.raises(FastsaeError, match=f"corrupt or truncated one .*{path.split('.')[-1]}"):
        parts.restore(changed(state, path, value), Path("run"))
    if not path.startswith("sequencer"):  # whose batches are known only when they are made
        assert parts.trainer.step == 0
    for name, tensor in parts.trainer.sae.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "path", ["seconds", "trainer", "trainer.step", "trainer.sums", "trainer.optimizer.0.exp_avg", "buffer.generator",
             "buffer.rows.acts", "sequencer.batch", "trainer.sae.b_dec"]
)  # fmt: skip
def test_a_missing_value_is_refused(saved: tuple[run._Parts, dict[str, Any]], path: str) -> None:
    parts, state = saved
    state = copy.deepcopy(state)
    *above, last = path.split(".")
    place = state
    for name in above:
        place = place[name]
    del place[last]
    with pytest.raises(FastsaeError, match=f"{last}: expected"):
        parts.restore(state, Path("run"))


JSON_VALUES = (
    st.none() | st.booleans() | st.integers(-3, 100) | st.integers() | st.floats() | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)  # fmt: skip
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES), st.floats(width=32),
)  # fmt: skip


def paths_of(state: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in state.items():
        found.append(prefix + name)
        if isinstance(value, dict):
            found += paths_of(value, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("n_examples", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_any_state_is_refused_or_trains_on(saved: tuple[run._Parts, dict[str, Any]], n_examples: int) -> None:
    parts, state = saved
    paths = paths_of(state)

    @hypothesis.settings(max_examples=n_examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        path=st.sampled_from(paths), value=JSON_VALUES | TENSORS, element=st.integers(0, 10**6), one=st.booleans()
    )
    def fuzz(path: str, value: Any, element: int, one: bool) -> None:
        def put(old: Any) -> Any:
            """The new value; or one number of a tensor, where it is a number."""
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**9
            if not (one and is_number and isinstance(old, torch.Tensor) and old.numel()):
                return value
            old = old.clone()
            is_small = old.dtype in (torch.uint8, torch.bool)
            old.view(-1)[element % old.numel()] = int(abs(value)) % 2 if is_small else value
            return old

        try:
            parts.restore(changed(state, path, put), Path("run"))
        except FastsaeError:
            return
        except (ValueError, RuntimeError, OverflowError) as error:
            if "convert" in str(error) or "infinity" in str(error):  # the test itself could not make the tensor
                return
            raise
        with contextlib.suppress(FastsaeError):  # such as a loss that is not finite
            for _ in range(3):  # what it took it can use
                parts.trainer._accumulate(parts.trainer.train_step(next(parts.trainer.batches)))
            parts.trainer._log()

    fuzz()


@pytest.mark.parametrize("n_examples", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_any_change_of_a_file_is_noticed(
    saved: tuple[run._Parts, dict[str, Any]], tmp_path: Path, n_examples: int
) -> None:
    _, state = saved
    checkpoint.save(tmp_path, 7, state)
    path = tmp_path / checkpoint.FOLDER / "step-000000007" / checkpoint.STATE
    good = path.read_bytes()

    @hypothesis.settings(max_examples=n_examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        start=st.integers(0, len(good)), length=st.integers(0, 9), put=st.binary(max_size=9) | st.just(b"[" * 9999)
    )
    def fuzz(start: int, length: int, put: bytes) -> None:
        text = good[:start] + put + good[start + length :]
        path.write_bytes(text)
        try:
            is_same = json.loads(text) == json.loads(good)
        except (ValueError, RecursionError):
            is_same = False
        if is_same:
            checkpoint.load_latest(tmp_path)
        else:
            with pytest.raises(FastsaeError, match="corrupt"):
                checkpoint.load_latest(tmp_path)

    fuzz()


def rewritten(chats: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = chats.read_text().splitlines(keepends=True)
    chats.write_text("".join(change(lines)))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[::-1],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:-1], lines[-1].replace("words", "digits")],
        lambda lines: [*lines[:5], lines[5].replace("user", "system"), *lines[6:]],
        lambda lines: lines[:-1],
    ],
    ids=["reversed", "two swapped", "another word", "another role", "one less"],
)
def test_other_data_are_refused_on_resume(tiny_model: Path, chats: Path, tmp_path: Path, change: Any) -> None:
    data = Path(shutil.copy(chats, tmp_path / "chats.jsonl"))
    output = stopped_run(make_config(tiny_model, data, checkpoint_every=2), tmp_path / "run", at=5)
    good = data.read_text()
    rewritten(data, change)
    with pytest.raises(UsageError, match=r"dataset .* has changed"):
        train(read_config(output), output, resume=True, progress=False)
    data.write_text(good)
    train(read_config(output), output, resume=True, progress=False)


def test_dialogues_that_are_not_used_may_change(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    data = Path(shutil.copy(chats, tmp_path / "chats.jsonl"))
    config = make_config(tiny_model, data, checkpoint_every=2, max_dialogues=30)
    output = stopped_run(config, tmp_path / "run", at=5)
    rewritten(data, lambda lines: [*lines, lines[3].replace("words", "new words")])
    train(read_config(output), output, resume=True, progress=False)


def test_a_long_dataset_is_told_by_a_sample_of_it() -> None:
    class Long(list):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            Long.read += 1
            return super().__getitem__(index)

    rows = Long([{"role": "user", "content": f"\ud800 {i}"}] for i in range(3 * fingerprint.SAMPLE))
    first = fingerprint.of_dialogues(rows)
    assert Long.read <= fingerprint.SAMPLE
    assert fingerprint.of_dialogues(rows) == first
    assert fingerprint.of_dialogues(Long(rows[::-1])) != first
    assert fingerprint.of_dialogues(Long(rows[:-1])) != first


def test_another_model_is_refused_on_resume(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    import transformers

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    output = stopped_run(make_config(model, chats, checkpoint_every=2), tmp_path / "run", at=5)
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(transformers.AutoConfig.from_pretrained(model)).save_pretrained(model)
    with pytest.raises(UsageError, match=r"model .* has changed"):
        train(read_config(output), output, resume=True, progress=False)


def test_a_models_fingerprint_is_that_of_its_weights_in_any_dtype(tiny_model: Path) -> None:
    from fastsae.data.language_model import load_model

    wide, tokenizer = load_model(str(tiny_model), "float32")
    narrow, _ = load_model(str(tiny_model), "bfloat16")
    first = fingerprint.of_model(wide, tokenizer)
    assert fingerprint.of_model(narrow, tokenizer) == first
    tokenizer.chat_template += " "
    assert fingerprint.of_model(wide, tokenizer) != first


def test_a_run_is_found_from_any_folder(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "here" / "model")
    shutil.copy(chats, tmp_path / "here" / "chats.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(Path("model"), Path("./chats.jsonl"), checkpoint_every=2)
    stopped_run(config, Path("run"), at=5)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    output = Path("../here/run")
    assert read_config(output).model == str(tmp_path / "here" / "model")
    assert cli.main(["train", "--resume", "--quiet", "--output", str(output), "--model", "../here/model"]) == 0
    evaluate_folder(output, read_config(output), progress=False)


def test_names_that_are_no_paths_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "demo").mkdir()
    (tmp_path / "mine").mkdir()
    assert located("demo") == "demo"
    assert located("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert located("./mine") == located("~/mine") == located("mine") == str(tmp_path / "mine")
    assert located("x" * 5000) == "x" * 5000
    assert located("a\0b") == "a\0b"


def test_leftovers_of_a_killed_run_count_as_nothing(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "checkpoints" / ".step-000000500").mkdir(parents=True)
    (output / ".config.json.abc_1234").write_text("{")
    assert is_new(output)
    train(make_config(tiny_model, chats), output, progress=False)
    assert {path.name for path in output.iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "config.json", "metrics.json", "report.html"
    }  # fmt: skip
    assert not is_new(output)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".config.json.mine").write_text("")  # no name that this library gives
    assert not is_new(tmp_path / "other")


def test_a_run_killed_before_its_first_file_starts_with_resume_too(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    assert cli.main(["train", "--resume", "--output", str(output)]) == 2
    assert "start it again with its options" in capsys.readouterr().err
    options = "--tokens 256 --batch-size 64 --buffer-tokens 256 --d-sae 32 --eval-dialogues 4 --quiet".split()
    arguments = ["train", "--resume", "--output", str(output), "--model", str(tiny_model), "--dataset", str(chats)]
    assert cli.main([*arguments, *options]) == 0


def test_a_complete_run_loses_the_checkpoints_that_a_kill_left(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, chats)
    train(config, tmp_path / "run", progress=False)
    checkpoint.save(tmp_path / "run", 12, {"step": 12})
    with pytest.raises(UsageError, match="complete"):
        train(config, tmp_path / "run", resume=True, progress=False)
    assert not (tmp_path / "run" / checkpoint.FOLDER).exists()


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_nan_never_replaces_a_good_checkpoint(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Any
) -> None:
    options: dict[str, Any] = {"architecture": architecture, "k": 4 if architecture == "topk" else None}
    config = make_config(tiny_model, chats, checkpoint_every=1, **options)
    train(config, tmp_path / "whole", progress=False)
    step = Trainer.train_step

    def spoiled(self: Trainer, batch: Any) -> Any:
        output = step(self, batch)
        if self.step == 6:
            with torch.no_grad():
                self.sae.W_enc[0, 0] = math.nan
        return output

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", spoiled)
        with pytest.raises(FastsaeError, match=r"step 6: .*W_enc holds NaN.*--lr"):
            train(config, tmp_path / "run", progress=False)
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    assert checkpoint.step_of(newest) == 5
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("every", [0, 500])
def test_a_run_whose_weights_end_as_nan_writes_no_sae(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    step = Trainer.train_step

    def spoiled(self: Trainer, batch: Any) -> Any:
        output = step(self, batch)
        if self.step == self.config.steps:
            self.sae.b_enc.data[0] = math.inf
        return output

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(FastsaeError, match="b_enc holds NaN or infinity"):
        train(make_config(tiny_model, chats, checkpoint_every=every), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "cfg.json").exists()


def test_a_batch_without_variance_has_no_fvu(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    config = replace(
        make_config(tiny_model, chats, checkpoint_every=2), batch_size=1, buffer_tokens=64, tokens=12, eval_dialogues=4
    )
    output = stopped_run(config, tmp_path / "run", at=9)
    state = checkpoint.load_latest(output)
    assert state is not None
    assert [row["fvu"] for row in state["trainer"]["history"]] == [None] * 8
    train(read_config(output), output, resume=True, progress=False)
    assert "<h1>" in (output / "report.html").read_text()


class FullDisk:
    """Lets so many files be written, then none."""

    def __init__(self, n: int) -> None:
        self.left, self.fsync = n, os.fsync

    def __call__(self, handle: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        self.fsync(handle)


def test_a_full_disk_at_any_write_loses_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tiny_model, chats, checkpoint_every=6)
    train(config, tmp_path / "whole", progress=False)
    arguments = ["train", "--resume", "--quiet", "--output", str(tmp_path / "run")]
    flags = {"model": tiny_model, "dataset": chats, "eval-dialogues": 8, "d-sae": 32, "tokens": 768, "batch-size": 64,
             "buffer-tokens": 256, "forward-tokens": 256, "init-l0": 8, "target-l0": 4, "log-every": 4,
             "checkpoint-every": 6}  # fmt: skip
    first = ["train", "--quiet", "--output", str(tmp_path / "run")]
    first += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    for n in range(100):
        is_new_run = is_new(tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", FullDisk(n))
            status = cli.main(first if is_new_run else arguments)
        err = capsys.readouterr().err
        if status == 0:
            break
        assert status == 1
        assert "the disk is full" in err
        assert not list((tmp_path / "run").rglob(".*")), "something half-written is left"
    assert n > 5
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_an_output_that_cannot_be_written_is_refused_at_once(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(run, "build_pipeline", None)  # before anything is loaded
    config = make_config(tiny_model, chats)
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=r"--output: expected a folder, but .*file exists"):
            train(config, output, progress=False)
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # root may write anywhere
    with pytest.raises(UsageError, match=r"--output: .* that can be written"):
        train(config, tmp_path / "locked" / "run", progress=False)
    assert (
        cli.main(["evaluate", str(tmp_path), "--model", "m", "--dataset", "d", "--layer", "0", "--json", str(tmp_path)])
        == 2
    )
