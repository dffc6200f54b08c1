"""What edits add to hidden states, against decoded activations in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae import (
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedTopKSAE,
    SparseAutoencoder,
    UsageError,
)
from fastsae.steering import Edit
from fastsae.steering.edits import Deltas, check_edits

D_IN, D_SAE = 12, 40
FEATURES = [3, 17, 8]
MAKERS: dict[str, Any] = {
    "jumprelu": lambda: FusedJumpReLUSAE(D_IN, D_SAE, init_threshold=0.3, dtype=torch.float64),
    "jumprelu_pre_bias": lambda: FusedJumpReLUSAE(D_IN, D_SAE, apply_b_dec_to_input=True, dtype=torch.float64),
    "jumprelu_k": lambda: FusedJumpReLUSAE(D_IN, D_SAE, k=15, dtype=torch.float64),
    "log_threshold": lambda: FusedJumpReLUSAE(D_IN, D_SAE, log_threshold=True, dtype=torch.float64),
    "relu": lambda: FusedReLUSAE(D_IN, D_SAE, apply_b_dec_to_input=True, dtype=torch.float64),
    "topk": lambda: FusedTopKSAE(D_IN, D_SAE, 12, dtype=torch.float64),
    "topk_plain": lambda: FusedTopKSAE(D_IN, D_SAE, 12, rescale_acts_by_decoder_norm=False, dtype=torch.float64),
    "batchtopk": lambda: FusedBatchTopKSAE(D_IN, D_SAE, 12, dtype=torch.float64),
}


def make_sae(name: str = "jumprelu") -> SparseAutoencoder:
    """An SAE whose biases and decoder norms are all different, so that a forgotten one shows."""
    sae: SparseAutoencoder = MAKERS[name]()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.3)
        sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
    if isinstance(sae, FusedBatchTopKSAE):
        sae.topk_threshold.fill_(0.4)
    return sae


def delta_of(sae: SparseAutoencoder | None, edits: list[Edit], h: Tensor) -> Tensor:
    deltas = Deltas(edits, sae)
    wide = deltas.wide(h)
    delta = deltas(wide, deltas.feature_acts(wide) if deltas.read_acts else None)
    return torch.zeros_like(wide) if delta is None else delta.expand_as(wide)


@pytest.fixture
def h() -> Tensor:
    return 1.5 * torch.randn(2, 30, D_IN, dtype=torch.float64)


@pytest.mark.parametrize("name", MAKERS)
def test_activation_edits_are_the_difference_of_two_decodes(name: str, h: Tensor) -> None:
    sae = make_sae(name)
    edits = [
        Edit(3, "clamp", 1.7),
        Edit(17, "min_clamp", 0.9),
        Edit(8, "scale", -2.5),
        Edit(30, "ablate"),
        Edit(31, "clamp", 0.5, unit="max", maximum=3.0),
        Edit(11, "min_clamp", 0.25, unit="max", maximum=4.0),
    ]
    with torch.no_grad():
        before = sae.encode(h)
        after = before.clone()
        after[..., 3] = 1.7
        after[..., 17] = before[..., 17].clamp(min=0.9)
        after[..., 8] *= -2.5
        after[..., 30] = 0
        after[..., 31] = 1.5
        after[..., 11] = before[..., 11].clamp(min=1.0)
        expected = sae.decode(after) - sae.decode(before)
    for edit in edits:  # both states of the gate were met
        assert 0 < (before[..., edit.feature] > 0).float().mean() < 1
    torch.testing.assert_close(delta_of(sae, edits, h), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_acts_are_those_of_encode(name: str, h: Tensor) -> None:
    sae = make_sae(name)
    edits = [Edit(i, "clamp", 1.0) for i in FEATURES] + [Edit(direction=torch.ones(D_IN)), Edit(3)]
    deltas = Deltas(edits, sae)
    acts = deltas.by_edit(deltas.feature_acts(deltas.wide(h)))
    expected = torch.zeros(2, 30, 5, dtype=torch.float64)
    expected[..., :3], expected[..., 4] = sae.encode(h)[..., FEATURES], sae.encode(h)[..., 3]
    torch.testing.assert_close(acts, expected, rtol=1e-9, atol=1e-12)


def test_add_in_each_unit(h: Tensor) -> None:
    sae = make_sae()
    d, other = sae.W_dec[3].detach(), torch.randn(D_IN, dtype=torch.float64)
    for edit, expected in (
        (Edit(3, "add", 7.0), 7.0 * d.expand_as(h)),
        (Edit(np.int64(3), "add", np.float32(7.0)), 7.0 * d.expand_as(h)),  # type: ignore[arg-type]
        (Edit(3, "add", 0.5, unit="max", maximum=4.0), 2.0 * d.expand_as(h)),
        (Edit(3, "add", -0.3, unit="norm"), -0.3 * h.norm(dim=-1, keepdim=True) * d / d.norm()),
        (Edit(direction=other, amount=2.0), 2.0 * other.expand_as(h)),
        (Edit(direction=other, amount=2.0, unit="norm"), 2 * h.norm(dim=-1, keepdim=True) * other / other.norm()),
    ):
        torch.testing.assert_close(delta_of(sae, [edit], h), expected, rtol=1e-12, atol=1e-12)


def test_add_of_a_rescaling_sae_pushes_by_what_a_unit_of_activation_decodes_to(h: Tensor) -> None:
    sae = make_sae("topk")
    one = torch.zeros(1, D_SAE, dtype=torch.float64)
    one[0, 3] = 1
    direction = (sae.decode(one) - sae.b_dec).detach()[0]
    torch.testing.assert_close(delta_of(sae, [Edit(3, "add", 4.0)], h), 4 * direction.expand_as(h))


def test_orthogonal_scales_the_part_along_the_direction(h: Tensor) -> None:
    sae = make_sae()
    d = sae.W_dec[3].detach()
    edited = h + delta_of(sae, [Edit(3, "orthogonal", 0.25)], h)
    torch.testing.assert_close(edited @ d, 0.25 * h @ d)
    across = h - (h @ d)[..., None] * d / d.dot(d)
    torch.testing.assert_close(edited - (edited @ d)[..., None] * d / d.dot(d), across)
    removed = h + delta_of(None, [Edit(direction=d, mode="orthogonal", amount=0.0)], h)
    assert (removed @ d).abs().max() < 1e-12


def test_deltas_of_several_edits_are_summed_from_the_same_states(h: Tensor) -> None:
    sae = make_sae()
    edits = [
        Edit(direction=torch.randn(D_IN), amount=3.0),
        Edit(3, "clamp", 2.0),
        Edit(3, "add", 1.0),
        Edit(8, "orthogonal", 0.5),
        Edit(3, "scale", 3.0),
        Edit(17, "add", 0.5, unit="norm"),
        Edit(direction=torch.randn(D_IN), mode="orthogonal", amount=-1.0),
    ]
    expected = sum(delta_of(sae, [edit], h) for edit in edits)
    torch.testing.assert_close(delta_of(sae, edits, h), expected)


def test_edits_that_do_nothing_add_zeros(h: Tensor) -> None:
    sae = make_sae()
    for edit in (Edit(3, "add", 0.0), Edit(3, "scale", 1.0), Edit(3, "orthogonal", 1.0), Edit(3, unit="norm")):
        assert not delta_of(sae, [edit], h).any()


def test_deltas_of_bf16_states_are_fp32() -> None:
    sae = make_sae().to(torch.float32)
    h = torch.randn(3, D_IN)
    deltas = Deltas([Edit(3, "clamp", 1.0)], sae)
    wide = deltas.wide(h.bfloat16())
    assert wide.dtype == torch.float32
    exact = delta_of(sae.double(), [Edit(3, "clamp", 1.0)], h.bfloat16().double())
    torch.testing.assert_close(deltas(wide, deltas.feature_acts(wide)).double(), exact, rtol=1e-5, atol=1e-6)


def test_fp16_norms_do_not_overflow() -> None:
    h = torch.full((1, D_IN), 30_000.0, dtype=torch.float16)
    edit = Edit(direction=torch.ones(D_IN), amount=0.1, unit="norm")
    assert torch.isfinite(delta_of(None, [edit], h).half()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": 3, "mode": "push"}, "mode: expected one of add, clamp, .*'push'"),
        ({"feature": 3, "unit": "sigma"}, "unit: expected one of absolute, max, norm, got 'sigma'"),
        ({"feature": 3, "mode": "clamp", "unit": "norm"}, "unit: expected absolute or max for clamp, got 'norm'"),
        ({"feature": 3, "mode": "scale", "unit": "max"}, "unit: expected absolute for scale"),
        ({"feature": 3, "amount": math.nan}, "amount: expected a finite number, got nan"),
        ({"feature": 3, "amount": -math.inf}, "amount: expected a finite number, got -inf"),
        ({"feature": 3, "amount": 10**400}, "amount: expected a finite number, got a number of about 401 digits"),
        ({"feature": 3, "amount": "5"}, "amount: expected a finite number, got '5'"),
        ({"feature": 3, "amount": True}, "amount: expected a finite number, got true"),
        ({"feature": 3, "unit": "max"}, "maximum: expected the feature's largest activation .* got none"),
        ({"feature": 3, "unit": "max", "maximum": 0.0}, "maximum: expected a finite number > 0, got 0.0"),
        ({"feature": 3, "unit": "max", "maximum": math.nan}, "maximum: expected a finite number > 0, got nan"),
        ({}, "feature: expected either a feature or a direction, got none"),
        ({"feature": 3, "direction": torch.ones(4)}, "feature: expected either .* got both"),
        ({"feature": -1}, "feature: expected an integer from 0 on, got -1"),
        ({"feature": 1.5}, "feature: expected an integer from 0 on, got 1.5"),
        ({"feature": True}, "feature: expected an integer from 0 on, got true"),
        ({"direction": torch.ones(2, 2)}, r"direction: expected a tensor \[d_in\] of numbers"),
        ({"direction": torch.zeros(4)}, "direction: expected finite numbers, not all of them 0"),
        ({"direction": torch.tensor([1.0, math.inf])}, "direction: expected finite numbers"),
        ({"direction": [1.0]}, "direction: expected a tensor"),
        ({"direction": torch.ones(4), "mode": "clamp"}, "mode: expected add or orthogonal for a direction"),
    ],
)
def test_an_edit_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Edit(**options)


def test_what_does_not_fit_the_sae_is_refused() -> None:
    sae = make_sae()
    for edits, given, width, message in (
        ([], sae, D_IN, "edits: expected a list with at least one Edit"),
        (Edit(3), sae, D_IN, "edits: expected a list with at least one Edit"),
        ([3], sae, D_IN, "edits: expected a list with at least one Edit"),
        ([Edit(D_SAE)], sae, D_IN, rf"feature: expected 0 to {D_SAE - 1} .*got {D_SAE}"),
        ([Edit(3)], sae, 16, "sae: expected the width of the model's residual stream, 16, got 12"),
        ([Edit(3)], None, D_IN, "sae: expected an SAE for the feature 3, got none"),
        ([Edit(3)], torch.nn.Linear(2, 2), D_IN, "sae: expected an SAE of this library, got Linear"),
        (
            [Edit(direction=torch.ones(5))],
            None,
            D_IN,
            "direction: expected the width of the residual stream, 12, got 5",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            check_edits(edits, given, width)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "value", "message"),
    [
        ("threshold", math.inf, "its threshold is not finite"),
        ("W_dec", 0.0, "its row of the decoder is zero or not finite"),
        ("W_dec", math.nan, "its row of the decoder is zero or not finite"),
        ("b_enc", -math.inf, "its encoder is not finite"),
    ],
)
def test_a_dead_feature_is_refused(weights: str, value: float, message: str) -> None:
    sae = make_sae()
    with torch.no_grad():
        getattr(sae, weights)[3] = value
    with pytest.raises(UsageError, match=f"feature: expected one that is alive, got 3: {message}"):
        check_edits([Edit(5), Edit(3)], sae, D_IN)
    check_edits([Edit(5)], sae, D_IN)


def test_large_steps_beside_a_rescaled_zero_row_stay_refused() -> None:
    sae = make_sae("topk")
    with torch.no_grad():
        sae.W_dec[3] = 0
    with pytest.raises(UsageError, match="its row of the decoder is zero"):
        check_edits([Edit(3)], sae, D_IN)
