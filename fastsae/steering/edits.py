"""Edits of the residual stream, and the sum of what they add to it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastsae.errors import UsageError, shown
from fastsae.sae import SparseAutoencoder

Mode = Literal["add", "clamp", "min_clamp", "scale", "ablate", "orthogonal"]
Unit = Literal["absolute", "max", "norm"]
_UNITS = {"add": get_args(Unit), "clamp": ("absolute", "max"), "min_clamp": ("absolute", "max")}
_READS_ACTS = ("clamp", "min_clamp", "scale", "ablate")


@dataclass(frozen=True)
class Edit:
    """One thing to do to the hidden states h: to push, set, scale or remove a feature, or to push along a direction.

        add          alpha d                        in units of `max`: alpha m d;  in units of `norm`: alpha |h| d / |d|
        clamp        (v - f) d                      in units of `max`: (v m - f) d
        min_clamp    (max(f, v) - f) d              so too
        scale        (c - 1) f d
        ablate       -f d
        orthogonal   (c - 1) (h . u) u              u = d / |d|

    where d is the feature's row of the decoder as the SAE decodes with it, f its activation, m its `maximum`, and alpha, v
    and c are `amount`. A clamp adds the difference of two reconstructions, so that what the SAE misses stays as it is.

    Args:
        feature: Index of the feature, or None with `direction`.
        mode: What is done.
        amount: alpha, v or c; ablate has none.
        unit: What alpha and v are multiples of.
        maximum: The largest activation of the feature that was seen.
        direction: `[d_in]`, taken as d in place of a feature's, to add or to scale the part of h along it (orthogonal).

    Raises:
        UsageError: A value is none of these, or not finite; or two contradict each other.
    """

    feature: int | None = None
    mode: Mode = "add"
    amount: float = 0.0
    unit: Unit = "absolute"
    maximum: float | None = None
    direction: Tensor | None = None

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("unit", self.unit, get_args(Unit))
        allowed = _UNITS.get(self.mode, ("absolute",))
        if self.unit not in allowed:
            raise UsageError(f"unit: expected {' or '.join(allowed)} for {self.mode}, got {self.unit!r}")
        if not is_finite(self.amount):
            raise UsageError(f"amount: expected a finite number, got {shown(self.amount)}")
        if self.unit == "max" and self.maximum is None:
            raise UsageError("maximum: expected the feature's largest activation for the unit 'max', got none")
        if self.maximum is not None and not (is_finite(self.maximum) and self.maximum > 0):
            raise UsageError(f"maximum: expected a finite number > 0, got {shown(self.maximum)}")
        if (self.feature is None) == (self.direction is None):
            got = "none" if self.feature is None else "both"
            raise UsageError(f"feature: expected either a feature or a direction, got {got}")
        if self.feature is not None:
            _check_feature(self.feature)
        else:
            self._check_direction()

    def _check_direction(self) -> None:
        d = self.direction
        if not isinstance(d, Tensor) or d.dim() != 1 or not d.is_floating_point():
            raise UsageError(f"direction: expected a tensor [d_in] of numbers, got {shown(d)}")
        if self.mode in _READS_ACTS:
            raise UsageError(f"mode: expected add or orthogonal for a direction, got {self.mode!r}")
        if not is_direction(d):
            raise UsageError("direction: expected finite numbers, not all of them 0, got others")

    @property
    def reads_acts(self) -> bool:
        """Whether what it adds depends on the feature's activation."""
        return self.mode in _READS_ACTS


def is_direction(d: Tensor) -> bool:
    """Whether d `[d_in]` is finite and points anywhere."""
    return bool(torch.isfinite(d).all() and d.any())


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")


def is_finite(value: Any) -> bool:
    """Whether this is a finite number, NumPy's too, and no truth value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _check_feature(feature: Any) -> None:
    try:
        number = operator.index(feature)  # NumPy's integers too
    except TypeError:
        number = -1
    if isinstance(feature, bool) or number < 0:
        raise UsageError(f"feature: expected an integer from 0 on, got {shown(feature)}")


def check_edits(edits: Sequence[Edit], sae: SparseAutoencoder | None, d_in: int) -> None:
    """Check that the edits can be made with this SAE in a stream of width d_in.

    Raises:
        UsageError: There is no edit, a feature is not there or dead, or a width is another one.
    """
    if not isinstance(edits, Sequence) or not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise UsageError(f"edits: expected a list with at least one Edit, got {shown(edits)}")
    if sae is not None and not isinstance(sae, SparseAutoencoder):
        raise UsageError(
            f"sae: expected an SAE of this library, got {type(sae).__name__}; SparseAutoencoder.load reads the files of others"
        )
    if sae is not None and sae.d_in != d_in:
        raise UsageError(f"sae: expected the width of the model's residual stream, {d_in}, got {sae.d_in}")
    for edit in edits:
        if edit.feature is not None:
            _check_alive(edit.feature, sae)
        elif edit.direction is not None and len(edit.direction) != d_in:
            raise UsageError(f"direction: expected the width of the residual stream, {d_in}, got {len(edit.direction)}")


@torch.no_grad()
def _check_alive(feature: int, sae: SparseAutoencoder | None) -> None:
    if sae is None:
        raise UsageError(f"sae: expected an SAE for the feature {feature}, got none")
    if feature >= sae.d_sae:
        raise UsageError(f"feature: expected 0 to {sae.d_sae - 1} (the SAE has {sae.d_sae} features), got {feature}")
    weights = sae.feature_weights([feature])
    reasons = {
        "its threshold is not finite": not torch.isfinite(weights.threshold).all(),
        "its encoder is not finite": not (torch.isfinite(weights.W_enc).all() and torch.isfinite(weights.b_enc).all()),
        "its row of the decoder is zero or not finite": not is_direction(weights.W_dec[0]),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"feature: expected one that is alive, got {feature}: {reason}")


class Deltas:
    """What edits add to the hidden states, all of it computed from the states before any edit, and summed.

    The few weights that are needed are gathered once. An edit whose coefficient depends on an activation or on h has the
    coefficient max(base + slope * reading, floor).

    Args:
        edits: Checked by `check_edits`.
        sae: The SAE whose features they name, if any.

    Raises:
        UsageError: What an edit adds is larger than its dtype's largest number.
    """

    @torch.no_grad()
    def __init__(self, edits: Sequence[Edit], sae: SparseAutoencoder | None) -> None:
        self.n_edits = len(edits)
        self._sae = sae
        self._slots = [i for i, edit in enumerate(edits) if edit.feature is not None]
        self._features = [int(edits[i].feature or 0) for i in self._slots]
        dtypes = [edit.direction.dtype for edit in edits if edit.direction is not None]
        wide = reduce(torch.promote_types, dtypes if sae is None else [*dtypes, sae.dtype], torch.float32)
        self._dtype = wide
        self._placed: tuple[torch.device, torch.dtype] | None = None
        device = torch.device("cpu") if sae is None else sae.device
        self._tensors: dict[str, Tensor] = {}
        rows = [edit.direction.to(device, wide) if edit.direction is not None else None for edit in edits]
        if sae is not None and self._features:
            weights = sae.feature_weights(self._features)
            for i, row in zip(self._slots, weights.W_dec.to(wide), strict=True):
                rows[i] = row
            if sae.k_per_token is None:
                own = {"W_enc": weights.W_enc, "b_enc": weights.b_enc, "threshold": weights.threshold}
                self._tensors |= {name: tensor.to(wide) for name, tensor in own.items()}
                if sae.apply_b_dec_to_input:
                    self._tensors["b_dec"] = sae.b_dec.detach().to(wide, copy=True)
        directions = torch.stack([row for row in rows if row is not None]).detach()
        self._gather(edits, directions)

    def _gather(self, edits: Sequence[Edit], d: Tensor) -> None:
        u = (d.double() / d.double().norm(dim=1, keepdim=True)).to(d)  # squares of small numbers are 0 in fp32
        constant, of_norm = torch.zeros_like(d[0]), torch.zeros_like(d[0])
        coefficients: list[tuple[float, float, float]] = []
        reading, along = list[int](), list[int]()
        for i, edit in enumerate(edits):
            amount = float(edit.amount) * (float(edit.maximum or 1) if edit.unit == "max" else 1.0)
            if edit.mode == "add" and edit.unit == "norm":
                of_norm += amount * u[i]
            elif edit.mode == "add":
                constant += amount * d[i]
            elif edit.mode == "orthogonal":
                along.append(i)
            else:
                reading.append(i)
                coefficients.append(_coefficients(edit.mode, amount))
        if constant.any():
            self._tensors["constant"] = constant
        if of_norm.any():
            self._tensors["of_norm"] = of_norm
        if along:
            factors = torch.tensor([float(edits[i].amount) - 1 for i in along]).to(d)
            self._tensors |= {"along": u[along].t().contiguous(), "removed": factors[:, None] * u[along]}
        self._reading = [self._slots.index(i) for i in reading]
        if reading:
            base, slope, floor = torch.tensor(coefficients, dtype=torch.float64).to(d).unbind(1)
            self._tensors |= {"base": base, "slope": slope, "floor": floor, "rows": d[reading]}
        if not all(torch.isfinite(tensor).all() for name, tensor in self._tensors.items() if name != "floor"):
            raise UsageError(
                f"amount: expected edits that {str(d.dtype).removeprefix('torch.')} holds, got larger ones"
            )

    @property
    def read_acts(self) -> bool:
        """Whether a delta depends on activations."""
        return bool(self._reading)

    def wide(self, hidden: Tensor) -> Tensor:
        """`hidden` in the dtype that deltas are computed in: at least fp32; the weights follow to its device."""
        dtype = torch.promote_types(hidden.dtype, self._dtype)
        if self._placed != (hidden.device, dtype):
            self._tensors = {name: tensor.to(hidden.device, dtype) for name, tensor in self._tensors.items()}
            self._placed = hidden.device, dtype
        return hidden.to(dtype)

    def feature_acts(self, hidden: Tensor) -> Tensor:
        """`[..., n]` activations of the edits' features on wide `hidden` `[..., d_in]`, edits of directions left out."""
        sae, weights = self._sae, self._tensors
        if sae is None or not self._features:
            return hidden.new_zeros(*hidden.shape[:-1], 0)
        if "W_enc" not in weights:  # the k largest of all features are active
            return sae.encode_features(hidden.to(sae.device), self._features).to(hidden)
        sae_in = hidden - weights["b_dec"] if "b_dec" in weights else hidden
        hidden_pre = sae_in @ weights["W_enc"] + weights["b_enc"]
        return torch.where(hidden_pre > weights["threshold"], hidden_pre, 0)

    def by_edit(self, feature_acts: Tensor) -> Tensor:
        """`[..., n_edits]` activations from those of `feature_acts`, with 0 for edits of directions."""
        if len(self._slots) == self.n_edits:
            return feature_acts
        every = feature_acts.new_zeros(*feature_acts.shape[:-1], self.n_edits)
        every[..., self._slots] = feature_acts
        return every

    def __call__(self, hidden: Tensor, feature_acts: Tensor | None) -> Tensor | None:
        """The sum of all deltas, `[..., d_in]` or `[d_in]`; None where every one is 0.

        Args:
            hidden: `[..., d_in]`, wide.
            feature_acts: What `feature_acts` gives for it; needed only where `read_acts`.
        """
        weights = self._tensors
        delta = weights.get("constant")
        if "of_norm" in weights:
            delta = _sum(delta, torch.linalg.vector_norm(hidden, dim=-1, keepdim=True) * weights["of_norm"])
        if "along" in weights:
            delta = _sum(delta, (hidden @ weights["along"]) @ weights["removed"])
        if feature_acts is not None and self._reading:
            readings = feature_acts if len(self._reading) == len(self._slots) else feature_acts[..., self._reading]
            coefficients = torch.maximum(weights["base"] + weights["slope"] * readings, weights["floor"])
            delta = _sum(delta, coefficients @ weights["rows"])
        return delta


def _coefficients(mode: str, amount: float) -> tuple[float, float, float]:
    """Base, slope and floor of what an edit multiplies its decoder row with."""
    if mode == "clamp":
        return amount, -1.0, -math.inf
    if mode == "min_clamp":
        return amount, -1.0, 0.0
    return 0.0, (0.0 if mode == "ablate" else amount) - 1.0, -math.inf


def _sum(total: Tensor | None, delta: Tensor) -> Tensor:
    return delta if total is None else total + delta
