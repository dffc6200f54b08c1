"""Reconstruction metrics as running sums: tokens go in batch by batch, only fp64 sums are kept.

Legend: n counts tokens, i dialogues, d the d_in elements of an activation x, x^ is its reconstruction.
Attention sinks (`fastsae.data.sinks`) are left out wherever a name does not say otherwise: one of them can be a hundred times
as long as all other activations, and a mean that holds it describes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import SparseActs

_MACRO = ("mse", "special_mse", "mse_with_sinks", "special_mse_with_sinks")
OTHER_TOKENS, SINKS = "all other tokens", "attention sinks"  # rows of the token table that are no special token
_NO_VARIANCE = 1e-12  # of the squared norm: what rounding leaves of a variance that is 0

Metrics = dict[str, float | int | None]


def ratio(numerator: float, denominator: float) -> float | None:
    """`numerator / denominator`, or None where that is undefined or not finite (NaN is not JSON)."""
    if denominator == 0 or not math.isfinite(numerator) or not math.isfinite(denominator):
        return None
    return numerator / denominator


def log2(value: float | None) -> float | None:
    """`log2(value)`, or None for 0 and for None."""
    return math.log2(value) if value else None


def number(value: Any, digits: int = 3) -> str:
    """A metric for reading: thousands separated, `digits` significant ones, a true minus sign, "n/a" where undefined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if isinstance(value, int) or value == 0 or abs(value) >= 10**digits:
        return f"{value:,.0f}".replace("-", "−")
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


class ReconstructionSums:
    """Everything about reconstruction and sparsity that a pass over the evaluation set accumulates.

    Tokens are sorted into kinds: one for each class of special tokens, one for all other tokens, and the same again for
    attention sinks. Sums of a kind make the token table; added up they make the metrics.

    Attributes:
        count, squared_error, squared_norm, norm, l0: `[2, n_special + 1]` fp64 sums over the tokens of a kind, of 1,
            ||x^ - x||^2, ||x||^2, ||x|| and the number of active features. Row 1 holds the sinks, the last column
            the tokens that are not special.
        vector: `[2, n_special + 1, d_in]` fp64 sum of x.
        feature_counts: `[d_sae]` int64, tokens on which a feature fires.
        special_acts: `[n_special, d_sae]` fp64 sum of activations at each class of special tokens.
        special_counts: `[d_sae]` int64, special tokens on which a feature fires.
        dialogues, late_sinks: Number of dialogues, and of sinks beyond position 0.
    """

    def __init__(self, d_in: int, d_sae: int, n_special: int, device: torch.device | str = "cpu") -> None:
        self.d_in, self.d_sae, self.n_special = d_in, d_sae, n_special
        kinds = (2, n_special + 1)
        fp64: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.count, self.squared_error, self.squared_norm, self.norm, self.l0 = torch.zeros(5, *kinds, **fp64)
        self.vector = torch.zeros(*kinds, d_in, **fp64)
        self.feature_counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.special_counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.special_acts = torch.zeros(n_special, d_sae, **fp64)
        self._macro_sum, self._macro_count = torch.zeros(2, len(_MACRO), **fp64)
        self.dialogues = self.late_sinks = 0

    def add(
        self,
        x: Tensor,
        sae_out: Tensor,
        acts: SparseActs,
        *,
        special: Tensor,
        sinks: Tensor,
        positions: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Adds the real tokens (no padding) of whole dialogues; returns `[N]`, ||x^ - x||^2 of each.

        Args:
            x: `[N, d_in]` activations.
            sae_out: `[N, d_in]` their reconstruction.
            acts: `[N, d_sae]` their features, packed.
            special: `[N]` class of each special token, `n_special` for all other tokens.
            sinks: `[N]` True for attention sinks.
            positions: `[N]`, 0 for the first token of a dialogue.
            rows: `[N]` dialogue of each token, counted from 0 inside this call; no dialogue spans two calls.
        """
        x = x.double()
        squared_error = (sae_out.double() - x).square().sum(-1)
        squared_norm = x.square().sum(-1)
        kind = special + torch.where(sinks, self.n_special + 1, 0)
        for total, values in (
            (self.count, torch.ones_like(squared_error)),
            (self.squared_error, squared_error),
            (self.squared_norm, squared_norm),
            (self.norm, squared_norm.sqrt()),
            (self.l0, acts.l0().double()),
        ):
            total.view(-1).index_add_(0, kind, values)
        self.vector.view(-1, self.d_in).index_add_(0, kind, x)
        self.dialogues += int((positions == 0).sum())
        self.late_sinks += int((sinks & (positions > 0)).sum())
        self._add_macro(squared_error / self.d_in, special < self.n_special, sinks, rows)
        self._add_features(acts, special, sinks)
        return squared_error

    def _add_macro(self, mse: Tensor, is_special: Tensor, sinks: Tensor, rows: Tensor) -> None:
        n_rows = int(rows.max()) + 1 if rows.numel() else 0
        for i, chosen in enumerate((~sinks, is_special & ~sinks, torch.ones_like(sinks), is_special)):
            counts, sums = torch.zeros(2, n_rows, dtype=torch.float64, device=mse.device)
            counts.index_add_(0, rows, chosen.double())
            sums.index_add_(0, rows, mse * chosen)
            self._macro_sum[i] += (sums / counts.clamp_min(1)).sum()
            self._macro_count[i] += (counts > 0).sum()

    def _add_features(self, acts: SparseActs, special: Tensor, sinks: Tensor) -> None:
        tokens = acts.row_ids()
        fires = (acts.values > 0) & ~sinks[tokens]
        features, kinds, values = acts.indices[fires].long(), special[tokens[fires]], acts.values[fires].double()
        self.feature_counts += torch.bincount(features, minlength=self.d_sae)
        on_special = kinds < self.n_special
        features, kinds, values = features[on_special], kinds[on_special], values[on_special]
        self.special_counts += torch.bincount(features, minlength=self.d_sae)
        self.special_acts.view(-1).index_add_(0, kinds * self.d_sae + features, values)

    def variance(self) -> Tensor:
        """`[2, n_special + 1]` sum of ||x - mean x||^2 of each kind; the mean is that of all tokens but the sinks.

        Computed as sum ||x||^2 - 2 mean . sum x + n ||mean||^2 in fp64.
        """
        mean = self.vector[0].sum(0) / self.count[0].sum().clamp_min(1)
        variance = self.squared_norm - 2 * self.vector @ mean + self.count * mean.square().sum()
        return torch.where(variance > _NO_VARIANCE * self.squared_norm, variance, 0)

    def metrics(self) -> Metrics:
        """The metrics of reconstruction and sparsity, None where one is undefined.

        With e_n = ||x_n - x^_n||^2 and L_i tokens in dialogue i:

            mse                      mean over i of (1/L_i) sum_{n in i} e_n / d_in, over the tokens that are no sinks;
                                     dialogues without any are left out
            special_mse              the same over special tokens
            *_with_sinks             the same over all tokens, as the paper counts them (arXiv:2506.07691, eq. 7)
            *_log2                   log2 of it
            mse_micro                sum_n e_n / (n d_in): every token counts the same
            special_mse_micro        the same over special tokens
            fvu                      sum e_n / sum ||x_n - mean x||^2
            special_fvu              the same over special tokens, about the mean of all tokens
            explained_variance       1 - fvu
            l0                       mean number of active features of a token
            l0_special               the same over special tokens
            dead_share               share of features that fire on no token
            norm                     mean ||x||
            fvu_sinks, mse_sinks,    fvu, mse_micro and mean ||x|| of the sinks; their fvu is about the mean of the other tokens
            norm_sinks
            sinks                    number of attention sinks
            sinks_beyond_position_0  those of them that are not the first token of a dialogue
            tokens, dialogues        number of them, sinks included
        """
        macro = [ratio(s, n) for s, n in zip(self._macro_sum.tolist(), self._macro_count.tolist(), strict=True)]
        count, error, variance = (sums.sum(1).tolist() for sums in (self.count, self.squared_error, self.variance()))
        norm, special = self.norm.sum(1).tolist(), slice(0, self.n_special)
        special_count, special_error = self.count[0, special].sum().item(), self.squared_error[0, special].sum().item()
        fvu = ratio(error[0], variance[0])
        values: Metrics = {}
        for name, value in zip(_MACRO, macro, strict=True):
            values |= {name: value, f"{name}_log2": log2(value)}
        return values | {
            "mse_micro": ratio(error[0], count[0] * self.d_in),
            "special_mse_micro": ratio(special_error, special_count * self.d_in),
            "fvu": fvu,
            "special_fvu": ratio(special_error, self.variance()[0, special].sum().item()),
            "explained_variance": None if fvu is None else 1 - fvu,
            "l0": ratio(self.l0[0].sum().item(), count[0]),
            "l0_special": ratio(self.l0[0, special].sum().item(), special_count),
            "dead_share": ratio((self.feature_counts == 0).sum().item(), self.d_sae) if count[0] else None,
            "norm": ratio(norm[0], count[0]),
            "fvu_sinks": ratio(error[1], variance[1]),
            "mse_sinks": ratio(error[1], count[1] * self.d_in),
            "norm_sinks": ratio(norm[1], count[1]),
            "sinks": int(count[1]),
            "sinks_beyond_position_0": self.late_sinks,
            "tokens": int(sum(count)),
            "dialogues": self.dialogues,
        }

    def token_table(self, names: Sequence[str]) -> list[dict[str, str | int | float | None]]:
        """A row for each class of special tokens (named `names`), one for all other tokens, one for attention sinks.

        Columns: token, count, `mse` = mean squared error per element, `fvu` = squared error over squared distance
        to the mean of all tokens, `l0`, `norm` = mean ||x||. All but the last row leave out sinks.
        """
        columns = [
            [*sums[0].tolist(), sums[1].sum().item()]
            for sums in (self.count, self.squared_error, self.variance(), self.l0, self.norm)
        ]
        return [
            {
                "token": token,
                "count": int(count),
                "mse": ratio(error, count * self.d_in),
                "fvu": ratio(error, variance),
                "l0": ratio(l0, count),
                "norm": ratio(norm, count),
            }
            for token, count, error, variance, l0, norm in zip([*names, OTHER_TOKENS, SINKS], *columns, strict=True)
        ]
