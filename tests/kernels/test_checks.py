"""Bad arguments of the public ops: one error that names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec


def encoder(**changed: Tensor) -> dict[str, Tensor]:
    given = {"x": torch.ones(6, 7), "W_enc": torch.ones(7, 20), "b_enc": torch.zeros(20), "threshold": torch.zeros(20)}
    return given | changed


ERRORS: dict[str, tuple[dict[str, Tensor], dict[str, Any], type[Exception], str]] = {
    "k is 0": ({}, {"k": 0}, ValueError, r"k: expected None or an integer >= 1, got 0"),
    "k is no integer": ({}, {"k": 2.5}, ValueError, r"k: expected None or an integer >= 1, got 2.5"),
    "k is text": ({}, {"k": "3"}, ValueError, r"k: expected None or an integer >= 1, got '3'"),
    "k over d_sae": ({}, {"k": 21}, ValueError, r"k: expected at most d_sae = 20, got 21"),
    "batch without k": ({}, {"batch_topk": True}, ValueError, r"k: expected an integer >= 1 with batch_topk, got None"),
    "window of a batch": (
        {}, {"k": 2, "batch_topk": True, "bandwidth": 0.1}, ValueError, r"bandwidth: expected 0 with batch_topk.* got 0.1",
    ),
    "integers": ({"x": torch.ones(6, 7, dtype=torch.int64)}, {}, TypeError, r"x: expected one of .* got torch.int64"),
    "mixed dtypes": ({"W_enc": torch.ones(7, 20).half()}, {}, TypeError, r"W_enc: expected .*32 .* got torch.float16"),
    "bias of a third dtype": (
        {"x": torch.ones(6, 7).bfloat16(), "W_enc": torch.ones(7, 20).bfloat16(), "b_enc": torch.zeros(20).half()},
        {}, TypeError, r"b_enc: expected torch.bfloat16 as the input x, or torch.float32, got torch.float16",
    ),
    "narrow threshold": (
        {"threshold": torch.zeros(20).bfloat16()}, {}, TypeError, r"threshold: expected torch.float32 .* got torch.bfloat16",
    ),
    "two devices": ({"b_enc": torch.zeros(20, device="meta")}, {}, ValueError, r"b_enc: expected device cpu .* got meta"),
    "no device": ({"x": torch.ones(6, 7, device="meta")}, {}, ValueError, r"x: expected .* a CPU or a GPU, got device meta"),
    "three dimensions": ({"x": torch.ones(2, 3, 7)}, {}, ValueError, r"x: expected two dimensions .* got shape \(2, 3, 7\)"),
    "other width": ({"x": torch.ones(6, 8)}, {}, ValueError, r"x: expected last dimension d_in = 7 .* got shape \(6, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_encode_names_what_is_wrong(
    tensors: dict[str, Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"^" + message):
        kernels.encode(**encoder(**tensors), **options)


def test_autoencode_takes_the_same_checks() -> None:
    decoder = {"W_dec": torch.ones(20, 7), "b_dec": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"^x: expected .* got device meta"):
        kernels.autoencode(**encoder(x=torch.ones(6, 7, device="meta")), **decoder, spec=AutoencodeSpec())
    with pytest.raises(ValueError, match=r"^k: expected at most d_sae = 20, got 21"):
        kernels.autoencode(**encoder(), **decoder, spec=AutoencodeSpec(k=21))
    with pytest.raises(TypeError, match=r"^b_dec: expected torch.float32 .* got torch.float64"):
        kernels.autoencode(**encoder(), **decoder | {"b_dec": torch.zeros(7).double()}, spec=AutoencodeSpec())


def test_decode_and_topk_of_entries_name_what_is_wrong() -> None:
    acts = kernels.encode(**encoder())
    with pytest.raises(TypeError, match=r"^W_dec: expected one of .* got torch.int64"):
        kernels.decode(acts, torch.ones(20, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^W_dec: expected .* got device meta"):
        kernels.decode(acts, torch.ones(20, 7, device="meta"))
    for k in (0, 2.5):
        with pytest.raises(ValueError, match=f"^k: expected an integer >= 1, got {k}"):
            acts.topk(k)  # type: ignore[arg-type]
