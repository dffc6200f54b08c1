"""Reconstruction metrics as running sums: tokens go in batch by batch, only fp64 sums are kept.

Legend: n counts tokens, i dialogues, d the d_in elements of an activation x, x^ is its reconstruction.
Position 0 is the first token of a dialogue, whose activation is often an outlier many times longer than all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import SparseActs

_MACRO = ("mse", "special_mse", "mse_without_position_0", "special_mse_without_position_0")
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


class ReconstructionSums:
    """Everything about reconstruction and sparsity that a pass over the evaluation set accumulates.

    Tokens are sorted into kinds: one for each special token, one for all other tokens, and the same again for
    position 0. Sums of a kind make the token table; added up they make the metrics.

    Attributes:
        count, squared_error, squared_norm, norm, l0: `[2, n_special + 1]` fp64 sums over the tokens of a kind, of 1,
            ||x^ - x||^2, ||x||^2, ||x|| and the number of active features. Row 1 is position 0, the last column holds
            the tokens that are not special.
        vector: `[2, n_special + 1, d_in]` fp64 sum of x.
        feature_counts: `[d_sae]` int64, tokens beyond position 0 on which a feature fires.
        special_acts: `[n_special, d_sae]` fp64 sum of activations at each special token beyond position 0.
        special_counts: `[d_sae]` int64, special tokens beyond position 0 on which a feature fires.
    """

    def __init__(self, d_in: int, d_sae: int, special_ids: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.d_in, self.d_sae = d_in, d_sae
        self.special_ids = torch.tensor(list(special_ids), dtype=torch.int64, device=device)
        self.n_special = len(special_ids)
        kinds = (2, self.n_special + 1)
        fp64: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.count, self.squared_error, self.squared_norm, self.norm, self.l0 = torch.zeros(5, *kinds, **fp64)
        self.vector = torch.zeros(*kinds, d_in, **fp64)
        self.feature_counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.special_counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.special_acts = torch.zeros(self.n_special, d_sae, **fp64)
        self._macro_sum, self._macro_count = torch.zeros(2, len(_MACRO), **fp64)

    def add(
        self, x: Tensor, sae_out: Tensor, acts: SparseActs, token_ids: Tensor, positions: Tensor, rows: Tensor
    ) -> None:
        """Adds the real tokens (no padding) of whole dialogues.

        Args:
            x: `[N, d_in]` activations.
            sae_out: `[N, d_in]` their reconstruction.
            acts: `[N, d_sae]` their features, packed.
            token_ids: `[N]`.
            positions: `[N]`, 0 for the first token of a dialogue.
            rows: `[N]` dialogue of each token, counted from 0 inside this call; no dialogue spans two calls.
        """
        x = x.double()
        squared_error = (sae_out.double() - x).square().sum(-1)
        squared_norm = x.square().sum(-1)
        special = self._special_index(token_ids)
        late = positions > 0
        kind = special + torch.where(late, 0, self.n_special + 1)
        for total, values in (
            (self.count, torch.ones_like(squared_error)),
            (self.squared_error, squared_error),
            (self.squared_norm, squared_norm),
            (self.norm, squared_norm.sqrt()),
            (self.l0, acts.l0().double()),
        ):
            total.view(-1).index_add_(0, kind, values)
        self.vector.view(-1, self.d_in).index_add_(0, kind, x)
        self._add_macro(squared_error / self.d_in, special < self.n_special, late, rows)
        self._add_features(acts, special, late)

    def _special_index(self, token_ids: Tensor) -> Tensor:
        """`[N]` index into `special_ids`; `n_special` for all other tokens."""
        matches = token_ids[:, None] == self.special_ids
        matches = torch.cat([matches, torch.ones_like(token_ids, dtype=torch.bool)[:, None]], dim=1)
        return matches.to(torch.int8).argmax(1)  # the first match

    def _add_macro(self, mse: Tensor, is_special: Tensor, late: Tensor, rows: Tensor) -> None:
        n_rows = int(rows.max()) + 1 if rows.numel() else 0
        everything = torch.ones_like(late)
        for i, chosen in enumerate((everything, is_special, late, is_special & late)):
            counts, sums = torch.zeros(2, n_rows, dtype=torch.float64, device=mse.device)
            counts.index_add_(0, rows, chosen.double())
            sums.index_add_(0, rows, mse * chosen)
            self._macro_sum[i] += (sums / counts.clamp_min(1)).sum()
            self._macro_count[i] += (counts > 0).sum()

    def _add_features(self, acts: SparseActs, special: Tensor, late: Tensor) -> None:
        tokens = acts.row_ids()
        fires = (acts.values > 0) & late[tokens]
        features, kinds, values = acts.indices[fires].long(), special[tokens[fires]], acts.values[fires].double()
        self.feature_counts += torch.bincount(features, minlength=self.d_sae)
        on_special = kinds < self.n_special
        features, kinds, values = features[on_special], kinds[on_special], values[on_special]
        self.special_counts += torch.bincount(features, minlength=self.d_sae)
        self.special_acts.view(-1).index_add_(0, kinds * self.d_sae + features, values)

    def variance(self) -> Tensor:
        """`[2, n_special + 1]` sum of ||x - mean x||^2 of each kind; the mean is that of all tokens beyond position 0.

        Computed as sum ||x||^2 - 2 mean . sum x + n ||mean||^2 in fp64.
        """
        mean = self.vector[0].sum(0) / self.count[0].sum().clamp_min(1)
        variance = self.squared_norm - 2 * self.vector @ mean + self.count * mean.square().sum()
        return torch.where(variance > _NO_VARIANCE * self.squared_norm, variance, 0)

    def metrics(self) -> Metrics:
        """The metrics of reconstruction and sparsity, None where one is undefined.

        With e_n = ||x_n - x^_n||^2 and L_i tokens in dialogue i:

            mse                   mean over i of (1/L_i) sum_{n in i} e_n / d_in      all positions (arXiv:2506.07691, eq. 7)
            special_mse           the same over special tokens; dialogues without any are left out
            *_log2                log2 of it
            mse_micro             sum_n e_n / (n d_in): every token counts the same
            *_without_position_0  over the other positions only
            fvu                   sum e_n / sum ||x_n - mean x||^2, without position 0, which is also not in the mean
            explained_variance    1 - fvu
            l0                    mean number of active features of a token, without position 0
            dead_share            share of features that fire on no token beyond position 0
            *_position_0          fvu, mse (micro) and mean ||x|| at position 0; its fvu is about the mean of the others
            l0_special            l0 over special tokens, without position 0
        """
        macro = [ratio(s, n) for s, n in zip(self._macro_sum.tolist(), self._macro_count.tolist(), strict=True)]
        count, error, variance = self.count.sum(1).tolist(), self.squared_error.sum(1).tolist(), self.variance().sum(1)
        norm, special_count = self.norm.sum(1).tolist(), self.count[0, :-1].sum().item()
        fvu = ratio(error[0], variance[0].item())
        values: Metrics = {}
        for name, value in zip(_MACRO, macro, strict=True):
            values[name] = value
            if "position" not in name:
                values[f"{name}_log2"] = log2(value)
        values |= {
            "mse_micro": ratio(sum(error), sum(count) * self.d_in),
            "special_mse_micro": ratio(
                self.squared_error[:, :-1].sum().item(), self.count[:, :-1].sum().item() * self.d_in
            ),
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1 - fvu,
            "l0": ratio(self.l0[0].sum().item(), count[0]),
            "l0_special": ratio(self.l0[0, :-1].sum().item(), special_count),
            "dead_share": ratio((self.feature_counts == 0).sum().item(), self.d_sae) if count[0] else None,
            "fvu_position_0": ratio(error[1], variance[1].item()),
            "mse_position_0": ratio(error[1], count[1] * self.d_in),
            "norm_position_0": ratio(norm[1], count[1]),
            "norm_without_position_0": ratio(norm[0], count[0]),
            "tokens": int(sum(count)),
            "dialogues": int(count[1]),
        }
        return values

    def token_table(self, names: Sequence[str]) -> list[dict[str, str | int | float | None]]:
        """A row for each special token (named `names`), one for all other tokens, one for position 0.

        Columns: token, id, count, `mse` = mean squared error per element, `fvu` = squared error over squared distance
        to the mean of all tokens, `l0`, `norm` = mean ||x||. All but the last row leave out position 0.
        """
        flat = [sums[0] for sums in (self.count, self.squared_error, self.variance(), self.l0, self.norm)]
        ends = [sums[1].sum()[None] for sums in (self.count, self.squared_error, self.variance(), self.l0, self.norm)]
        columns = [torch.cat(pair).tolist() for pair in zip(flat, ends, strict=True)]
        tokens = [*names, "all other tokens", "position 0"]
        ids: list[int | None] = [*self.special_ids.tolist(), None, None]
        return [
            {
                "token": token,
                "id": index,
                "count": int(count),
                "mse": ratio(error, count * self.d_in),
                "fvu": ratio(error, variance),
                "l0": ratio(l0, count),
                "norm": ratio(norm, count),
            }
            for token, index, count, error, variance, l0, norm in zip(tokens, ids, *columns, strict=True)
        ]
