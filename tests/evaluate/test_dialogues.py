"""Sums of each dialogue against a loop over tokens in fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.evaluate.dialogues import (
    _KINDS_OF,
    CLASSES,
    DIALOGUES_FILE,
    FIELDS,
    ActivationRecorder,
    DialogueRecorder,
    DialogueSums,
)
from fastsae.evaluate.losses import LOSSES
from fastsae.evaluate.token_kinds import KINDS

D_IN, N_DIALOGUES = 6, 9


def data(seed: int = 0, offset: float = 3.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (N_DIALOGUES,), generator=generator)
    rows = torch.arange(N_DIALOGUES).repeat_interleave(lengths)
    n = len(rows)
    return {
        "rows": rows,
        "kinds": torch.randint(len(KINDS), (n,), generator=generator),
        "x": torch.randn(n, D_IN, generator=generator) + offset,
        "squared_error": torch.rand(n, generator=generator),
        "l0": torch.randint(50, (n,), generator=generator),
        "losses": torch.rand(len(LOSSES), n, generator=generator),
        "dialogues": torch.randperm(100, generator=generator)[:N_DIALOGUES],
    }


def recorded(found: dict[str, torch.Tensor], n_calls: int) -> DialogueSums:
    activations = ActivationRecorder(D_IN)
    recorder = DialogueRecorder(activations)
    for part in torch.arange(N_DIALOGUES).chunk(n_calls):
        own = (found["rows"][:, None] == part).any(1)
        places = {"rows": found["rows"][own] - part[0], "kinds": found["kinds"][own]}
        activations.add(found["dialogues"][part], found["x"][own], **places)
        sums = {name: found[name][own] for name in ("squared_error", "l0")}
        recorder.add(len(part), **sums, losses=found["losses"][:, own], **places)
    return recorder.finish()


@pytest.mark.parametrize("n_calls", [1, 4, 9])
def test_sums_are_those_of_a_loop_over_tokens(n_calls: int) -> None:
    found = data()
    sums = recorded(found, n_calls)
    order = found["dialogues"].argsort()
    assert sums.dialogues.tolist() == found["dialogues"][order].tolist()
    spoken = torch.tensor([KINDS[kind] in _KINDS_OF["all"] for kind in found["kinds"].tolist()])
    mean = found["x"].double()[spoken].mean(0)
    expected = torch.zeros(N_DIALOGUES, len(CLASSES), len(FIELDS), dtype=torch.float64)
    for i, row in enumerate(found["rows"].tolist()):
        values = {
            "tokens": 1.0,
            "squared_error": found["squared_error"][i].item(),
            "variance": (found["x"][i].double() - mean).square().sum().item(),
            "l0": found["l0"][i].item(),
            **dict(zip(LOSSES, found["losses"][:, i].tolist(), strict=True)),
        }
        for c, kinds in enumerate(_KINDS_OF.values()):
            if KINDS[int(found["kinds"][i])] in kinds:
                expected[row, c] += torch.tensor([values[name] for name in FIELDS], dtype=torch.float64)
    np.testing.assert_allclose(sums.values, expected[order], rtol=1e-5, atol=1e-5)


def test_classes_hold_the_sinks_that_their_names_say() -> None:
    assert list(_KINDS_OF) == list(CLASSES)
    for name, kinds in _KINDS_OF.items():
        has_sinks = any("sink" in kind or "position_0" in kind for kind in kinds)
        assert has_sinks is ("sinks" in name or name == "position_0")
    assert set(_KINDS_OF["all_with_sinks"]) == set(KINDS)


def test_files(tmp_path: Path) -> None:
    sums = recorded(data(), 2)
    sums.save(tmp_path)
    read = DialogueSums.load(tmp_path)
    assert read.d_in == D_IN
    assert np.array_equal(read.values, sums.values)
    assert np.array_equal(read.get("tokens", "all"), sums.values[:, 0, 0])
    content = (tmp_path / DIALOGUES_FILE).read_bytes()
    (tmp_path / DIALOGUES_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(FastsaeError, match="damaged file"):
        DialogueSums.load(tmp_path)
    with pytest.raises(FastsaeError, match="found none"):
        DialogueSums.load(tmp_path / "nowhere")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_numbers_that_no_sum_has(bad: float) -> None:
    sums = recorded(data(), 1)
    values = sums.values.copy()
    values[4, 2, 0] = bad
    with pytest.raises(FastsaeError, match=r"user|negative"):
        DialogueSums(D_IN, values, sums.dialogues)
    with pytest.raises(FastsaeError, match="expected the shape"):
        DialogueSums(D_IN, values, sums.dialogues[:3])
