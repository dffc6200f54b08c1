"""Each value of a checkpoint is checked before any of it is used."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import load_latest, make_config, stopped_run

from fastsae import FastsaeError, UsageError
from fastsae.disk import write_json
from fastsae.errors import shown
from fastsae.train import checkpoint, run
from fastsae.train.folder import CONFIG_FILE, read_config

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (pip install hypothesis)")
st = hypothesis.strategies


@pytest.fixture(scope="module")
def saved(
    tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[run.Session, dict[str, Any]]:
    """The parts of a run, and the state of a checkpoint between two points of its curves."""
    config = replace(make_config(tiny_model, chats, checkpoint_every=1), tokens=64 * 160)
    output = stopped_run(config, tmp_path_factory.mktemp("run") / "run", at=7)
    state = load_latest(output)
    assert state is not None
    return run.Session(run.build_pipeline(config), {"": read_config(output)}), state


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
    *(("trainers.0.step", value) for value in (-5, True, 7.0, 161, 10**30, "7", None, [7])),
    *(("trainers.0.scale", value) for value in (0, -1.0, math.nan, math.inf, True, "1", None)),
    *(("seconds", value) for value in (-1, math.nan, "1", None)),
    ("trainers.0.silent_tokens", filled(-1)),
    ("trainers.0.silent_tokens", filled(10**9)),
    ("trainers.0.silent_tokens", lambda tensor: tensor[:-1]),
    ("trainers.0.silent_tokens", lambda tensor: tensor.float()),
    ("trainers.0.dead_mask", torch.ones(5, dtype=torch.bool)),
    ("trainers.0.dead_mask", torch.ones(32)),
    ("trainers.0.sae.W_enc", lambda tensor: tensor.t()),
    ("trainers.0.sae.W_enc", lambda tensor: tensor.double()),
    ("trainers.0.sae.b_enc", filled(math.nan)),
    ("trainers.0.sae.b_enc", 3),
    ("trainers.0.sae.other", torch.zeros(3)),
    ("trainers.0.sae", {}),
    ("trainers.0.other", 1),
    ("trainers.0.optimizer", {}),
    ("trainers.0.optimizer.9", {}),
    ("trainers.0.optimizer.0", 1),
    ("trainers.0.optimizer.0.step", filled(3)),
    ("trainers.0.optimizer.0.step", filled(math.inf)),
    ("trainers.0.optimizer.1.exp_avg", lambda tensor: tensor[:1]),
    ("trainers.0.optimizer.1.exp_avg_sq", filled(-1)),
    ("trainers.0.optimizer.1.exp_avg_sq", filled(math.inf)),
    ("trainers.0.sums", {}),
    ("trainers.0.sums.loss", torch.zeros(2)),
    ("trainers.0.sums.loss", filled(math.inf)),
    ("trainers.0.sums.loss", 1.0),
    ("trainers.0.history", {}),
    ("trainers.0.history", [1]),
    ("trainers.0.history", lambda rows: rows + rows),
    ("trainers.0.history", lambda rows: [{**rows[0], "tokens": 1}]),
    ("trainers.0.history", lambda rows: [{**rows[0], "loss": None}]),
    ("trainers.0.history", lambda rows: [{"step": 4, "tokens": 256}]),
    ("buffers.1.rows", None),
    ("buffers.1.rows.acts", lambda tensor: tensor[:, :-1]),
    ("buffers.1.rows.token_ids", lambda tensor: tensor[:-1]),
    ("buffers.1.rows.acts", filled(math.nan)),
    ("buffers.1.rows.acts", lambda tensor: tensor.long()),
    ("buffers.1.rows.dialogue_ids", filled(40)),
    ("buffers.1.rows.token_ids", filled(-1)),
    ("buffers.1.rows.positions", lambda tensor: tensor.int()),
    ("buffers.1.pending", 3),
    ("buffers.1.to_serve", 10**6),
    ("buffers.1.to_serve", -1),
    ("buffers.1.served_any", 1),
    ("buffers.1.generator", filled(255)),
    ("buffers.1.generator", lambda tensor: tensor[:-1]),
    ("streams.1.sequencer.at.epoch", -1),
    ("streams.1.sequencer.at.window", 1),
    ("streams.1.sequencer.at.batch", 10**6),
    ("streams.1.sequencer.at.batch", 1.0),
    ("streams.1.sequencer.at.dropped", -1),
    ("streams.1.sequencer.at.other", 0),
    ("streams.1.sequencer", None),
    ("streams.1.median_norm", -1.0),
    ("streams.1.sequencer.taken", -1),
    ("streams.1.sequencer.taken", 1.0),
    ("streams.1.counts.padding", -1),
    ("buffers.1.taken", -1),
    ("options", [1]),
    ("options.0.other", 1),
    ("other", 1),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{i}-{path}" for i, (path, _) in enumerate(WRONG)])
def test_a_wrong_value_is_refused_before_anything_is_used(
    saved: tuple[run.Session, dict[str, Any]], path: str, value: Any
) -> None:
    parts, state = saved
    before = {name: tensor.clone() for name, tensor in parts.trainers[""].sae.state_dict().items()}
    with pytest.raises(FastsaeError, match=f"corrupt or truncated one .*{path.split('.')[-1]}"):
        parts.restore(changed(state, path, value), Path("run"))
    if not path.startswith("streams"):  # whose batches are known only when they are made
        assert parts.trainers[""].step == 0
    for name, tensor in parts.trainers[""].sae.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "path", ["seconds", "options", "options.0.layer", "trainers.0", "trainers.0.step", "trainers.0.sums",
             "trainers.0.sums.fvu_steps",
             "trainers.0.optimizer.0.exp_avg", "trainers.0.l0_control", "trainers.0.sae.b_dec", "buffers.1.generator",
             "buffers.1.rows.acts", "streams.1.sequencer.at.batch"]
)  # fmt: skip
def test_a_missing_value_is_refused(saved: tuple[run.Session, dict[str, Any]], path: str) -> None:
    parts, state = saved
    state = copy.deepcopy(state)
    *above, last = path.split(".")
    place = state
    for name in above:
        place = place[name]
    del place[last]
    with pytest.raises(FastsaeError, match=f"{last}: expected"):
        parts.restore(state, Path("run"))


@pytest.mark.parametrize(
    ("name", "value"), [("layer", 0), ("forward_tokens", 512), ("lr", 1e-4), ("architecture", "relu"), ("k", 3)]
)
def test_options_edited_in_config_json_are_refused(
    tiny_model: Path, chats: Path, tmp_path: Path, name: str, value: Any
) -> None:
    output = stopped_run(make_config(tiny_model, chats, checkpoint_every=2), tmp_path / "run", at=5)
    content = json.loads((output / CONFIG_FILE).read_text())
    write_json(output / CONFIG_FILE, {**content, name: value})
    with pytest.raises(
        UsageError, match=rf"{name}: the run's checkpoint was made with {shown(content[name])}, .* {shown(value)}"
    ):
        run.train(read_config(output), output, resume=True, progress=False)


def test_buffer_of_another_dtype_is_refused(saved: tuple[run.Session, dict[str, Any]]) -> None:
    parts, state = saved
    parts.restore(changed(state, "buffers.1.rows.acts", lambda tensor: tensor.bfloat16()), Path("run"))
    with pytest.raises(UsageError, match=r"acts of the checkpoint's buffer are torch\.bfloat16, .* torch\.float32"):
        list(itertools.islice(parts.supply.buffers[1], 10))  # until the buffer is filled up again


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
def test_any_state_is_refused_or_trains_on(saved: tuple[run.Session, dict[str, Any]], n_examples: int) -> None:
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
                parts.supply.serve()
                parts.trainers[""].advance()
            parts.trainers[""]._log()

    fuzz()


@pytest.mark.parametrize("n_examples", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_any_change_of_a_file_is_noticed(
    saved: tuple[run.Session, dict[str, Any]], tmp_path: Path, n_examples: int
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
            load_latest(tmp_path)
        else:
            with pytest.raises(FastsaeError, match="corrupt"):
                load_latest(tmp_path)

    fuzz()
