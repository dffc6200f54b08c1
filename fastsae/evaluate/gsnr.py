"""Gradient signal-to-noise ratios (GSNR) of an SAE's parameters, over tokens and over dialogues.

The GSNR of a parameter is `(E g)^2 / Var g`, of its gradient g over the data (Liu et al. 2020, arXiv:2001.07384). From N draws
with the mean m and the variance s2 (divided by N - 1) it is estimated as

    ratio = (m^2 - s2 / N) / s2

because `m^2` alone exceeds `(E g)^2` by `s2 / N` on average: pure noise would seem to have a ratio of 1 / N. What is left of
noise has a standard deviation of about 1.4 / N for one parameter, and less for many together. Parameters with `s2 = 0` have no
ratio. Only sums of g and of g^2 are kept. The gradients of one token are of rank one, so that the squares in them
are products of squares, and both sums are passes over the entries of each feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastsae.data.activations import ResidualStream
from fastsae.data.progress import bar
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import MAX_NORM_MULTIPLE, SinkRule
from fastsae.errors import UsageError
from fastsae.evaluate.metrics import ratio
from fastsae.sae import SparseAutoencoder
from fastsae.sae.token_gradients import SparsityTerm, TokenGradients, token_gradients

SAMPLED_FEATURES = 256  # whose weights have gradients of whole dialogues
_BLOCK_ELEMENTS = 2**21  # the sums of so many features are added together as have this many numbers
_ROUNDING = 1e-12  # of the mean square: what rounding leaves of a variance that is 0

Summary = dict[str, float | int | None]


class Moments:
    """Sums of a gradient and of its square, over tokens or dialogues, in fp64.

    Args:
        shape: Of the parameter, features first.
        device: Where the sums are kept: 16 bytes a number.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.first, self.second = torch.zeros(2, *shape, dtype=torch.float64, device=device)

    def add_rows(self, index: Tensor, rows: Tensor) -> None:
        """Adds gradients `rows` `[n, ...]`, which are draws of the features `index` `[n]` and 0 in every other draw."""
        self.first.index_add_(0, index, rows)
        self.second.index_add_(0, index, rows.square())

    def add_draws(self, rows: Tensor) -> None:
        """Adds one gradient of the whole parameter per row, `[n, ...]`."""
        self.first += rows.sum(0)
        self.second += rows.square().sum(0)

    def ratios(self, n: int) -> tuple[Tensor, Tensor]:
        """The ratio of each parameter from n draws, not floored, and the variance; both NaN where that is 0."""
        mean, mean_square = self.first / n, self.second / n
        variance = (mean_square - mean.square()) * (n / (n - 1)) if n > 1 else torch.zeros_like(mean)
        variance = variance.masked_fill(variance <= _ROUNDING * mean_square, torch.nan)
        return mean.square() / variance - 1 / n, variance

    def summary(self, n: int, live: Tensor | None = None) -> dict[str, Any]:
        """What n draws say of a parameter.

        Returns:
            `pooled`, the ratio `|E g|^2 / trace Cov g` of all numbers together, whose bias is taken off too, and for the
            groups `live` and `dead` of features (`all`, where there are no features) what `_quartiles` says.
        """
        ratios, variance = self.ratios(n)
        is_noisy = ~variance.isnan()
        signal = (ratios * variance)[is_noisy].sum().item()
        found: dict[str, Any] = {"pooled": ratio(signal, variance[is_noisy].sum().item())}
        if live is None:
            return found | {"all": _quartiles(ratios)}
        return found | {"live": _quartiles(ratios[live]), "dead": _quartiles(ratios[~live])}


def _quartiles(ratios: Tensor) -> Summary:
    """Quartiles of the ratios, each floored at 0, and their mean, which is not floored and so 0 on average for pure noise."""
    values = ratios[~ratios.isnan()].cpu().numpy()
    found: Summary = {"parameters": ratios.numel(), "with_variance": values.size}
    if values.size == 0:
        return found | dict.fromkeys(("mean", "lower_quartile", "median", "upper_quartile"))
    quartiles = np.maximum(np.quantile(values, [0.25, 0.5, 0.75]), 0).tolist()
    return (
        found
        | {"mean": float(values.mean())}
        | dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True))
    )


class GradientMoments:
    """Accumulates the gradients of an SAE's parameters, batch by batch.

    It holds 32 bytes per weight of the SAE. A batch takes some vectors per token and some numbers per entry; nothing is of the
    size tokens x features, or dialogues x weights.

    Args:
        sae: The SAE, which must not change meanwhile.
        term: The sparsity term of its loss.
        n_sampled: Features, drawn by `seed`, whose weights have gradients of whole dialogues.
        seed: Draws them.
    """

    def __init__(
        self, sae: SparseAutoencoder, term: SparsityTerm, *, n_sampled: int = SAMPLED_FEATURES, seed: int = 0
    ) -> None:
        self.sae, self.term, device = sae, term, sae.device
        d_sae, d_in = sae.d_sae, sae.d_in
        order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
        self.sampled = order[:n_sampled].sort().values.to(device)
        self._slots = torch.full((d_sae,), -1, device=device)  # place of each feature among those that are sampled
        self._slots[self.sampled] = torch.arange(len(self.sampled), device=device)
        vectors = {"b_enc": (d_sae,), "threshold": (d_sae,), "b_dec": (d_in,)}
        if not hasattr(sae, "threshold"):
            del vectors["threshold"]
        matrices, few = ("W_enc", "W_dec"), (len(self.sampled), d_in)
        self.of_tokens = {name: Moments((d_sae, d_in), device) for name in matrices}
        self.of_dialogues = {name: Moments(few, device) for name in matrices}
        for name, shape in vectors.items():
            self.of_tokens[name], self.of_dialogues[name] = Moments(shape, device), Moments(shape, device)
        self.fires = torch.zeros(d_sae, dtype=torch.bool, device=device)
        self.n_tokens = self.n_dialogues = 0

    @torch.no_grad()
    def add(self, x: Tensor, dialogues: Tensor) -> None:
        """Adds the tokens of some dialogues.

        Args:
            x: `[N, d_in]` activations.
            dialogues: `[N]` int64, the dialogue of each token. One that comes in two calls counts as two.
        """
        if len(x) == 0:
            return
        gradients = token_gradients(self.sae, x, self.term)
        self.fires[gradients.features[gradients.acts > 0]] = True
        directions = None
        if gradients.along is not None:
            directions = functional.normalize(self.sae.W_dec.double(), dim=1)
        self._add_tokens(gradients, directions)
        names, units = dialogues.to(x.device).unique(return_inverse=True)
        self._add_dialogues(gradients, directions, units, len(names))
        self.n_tokens += len(x)
        self.n_dialogues += len(names)

    def _add_tokens(self, gradients: TokenGradients, directions: Tensor | None) -> None:
        moments, features, by_feature = self.of_tokens, gradients.features, gradients.features.argsort(stable=True)
        moments["b_enc"].add_rows(features, gradients.hidden_pre)
        moments["b_dec"].add_draws(gradients.b_dec)
        if gradients.threshold is not None:
            moments["threshold"].add_rows(features, gradients.threshold)
        tokens, acts, hidden_pre = (
            tensor[by_feature] for tensor in (gradients.tokens, gradients.acts, gradients.hidden_pre)
        )
        along = None if gradients.along is None else gradients.along[by_feature]
        ends = functional.pad(torch.bincount(features, minlength=self.sae.d_sae).cumsum(0), (1, 0))
        error, x = gradients.error, gradients.x
        squared_error, squared_x = error.square(), x.square()
        size = max(1, _BLOCK_ELEMENTS // self.sae.d_in)
        for start in range(0, self.sae.d_sae, size):
            rows = slice(start, min(start + size, self.sae.d_sae))
            bounds = ends[rows.start : rows.stop + 1]
            entries = slice(int(bounds[0]), int(bounds[-1]))
            own, offsets = tokens[entries], bounds - bounds[0]
            for name, weights, vectors, squares in (
                ("W_enc", hidden_pre[entries], x, squared_x),
                ("W_dec", acts[entries], error, squared_error),
            ):
                moments[name].first[rows] += _sums(weights, vectors, own, offsets)
                moments[name].second[rows] += _sums(weights.square(), squares, own, offsets)
            if along is not None and directions is not None:  # (a e + b u)^2 = a^2 e^2 + 2 u (a b e) + u^2 b^2
                extra, unit = along[entries], directions[rows]
                both = _sums(acts[entries] * extra, error, own, offsets)
                lengths, squares = (_segments(values, offsets)[:, None] for values in (extra, extra.square()))
                moments["W_dec"].first[rows] += unit * lengths
                moments["W_dec"].second[rows] += 2 * unit * both + unit.square() * squares

    def _add_dialogues(self, gradients: TokenGradients, directions: Tensor | None, units: Tensor, n_units: int) -> None:
        """Adds the mean gradient of each dialogue's tokens; `units` `[N]` counts the dialogues of this batch from 0."""
        moments, share = self.of_dialogues, 1 / torch.bincount(units, minlength=n_units).double()
        of_entries = share[units[gradients.tokens]]
        pairs, of_pair = (units[gradients.tokens] * self.sae.d_sae + gradients.features).unique(return_inverse=True)
        for name, values in (("b_enc", gradients.hidden_pre), ("threshold", gradients.threshold)):
            if values is not None:
                sums = torch.zeros(len(pairs), dtype=torch.float64, device=values.device)
                sums.index_add_(0, of_pair, values * of_entries)
                moments[name].add_rows(pairs % self.sae.d_sae, sums)
        means = torch.zeros(n_units, self.sae.d_in, dtype=torch.float64, device=units.device)
        moments["b_dec"].add_draws(means.index_add_(0, units, gradients.b_dec * share[units][:, None]))

        slots = self._slots[gradients.features]
        chosen = (slots >= 0).nonzero().squeeze(1)
        pairs, order = (units[gradients.tokens[chosen]] * len(self.sampled) + slots[chosen]).sort(stable=True)
        chosen = chosen[order]
        pairs, counts = pairs.unique_consecutive(return_counts=True)
        offsets, slots = functional.pad(counts.cumsum(0), (1, 0)), pairs % max(1, len(self.sampled))
        tokens, weight = gradients.tokens[chosen], of_entries[chosen]
        moments["W_enc"].add_rows(slots, _sums(gradients.hidden_pre[chosen] * weight, gradients.x, tokens, offsets))
        decoder = _sums(gradients.acts[chosen] * weight, gradients.error, tokens, offsets)
        if gradients.along is not None and directions is not None:
            lengths = _segments(gradients.along[chosen] * weight, offsets)
            decoder += lengths[:, None] * directions[self.sampled[slots]]
        moments["W_dec"].add_rows(slots, decoder)

    def result(self) -> dict[str, Any]:
        """The ratios by group, ready for JSON; see `gsnr`."""
        few = self.fires[self.sampled]
        live = {"W_enc": few, "W_dec": few, "b_enc": self.fires, "threshold": self.fires}
        return {
            "coefficient": float(self.term.coefficient),
            "tokens": self.n_tokens,
            "dialogues": self.n_dialogues,
            "live_features": int(self.fires.sum()),
            "sampled_features": len(self.sampled),
            "per_token": {
                name: moments.summary(self.n_tokens, None if name == "b_dec" else self.fires)
                for name, moments in self.of_tokens.items()
            },
            "per_dialogue": {
                name: moments.summary(self.n_dialogues, live.get(name)) for name, moments in self.of_dialogues.items()
            },
        }


def _sums(weights: Tensor, vectors: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """`out[i] = sum of weights[e] * vectors[tokens[e]]` over the entries e of segment i, `[n_segments, d]`."""
    return functional.embedding_bag(
        tokens, vectors, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _segments(values: Tensor, offsets: Tensor) -> Tensor:
    """`[n_segments]` sums of `values`."""
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)


@torch.no_grad()
def gsnr(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    batches: Iterable[TokenBatch],
    term: SparsityTerm,
    *,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
    n_sampled: int = SAMPLED_FEATURES,
    seed: int = 0,
    n_dialogues: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures the GSNR of an SAE's parameters on batches of tokens, attention sinks left out.

    The loss is that of training, squared error and sparsity term, without the losses for dead features; see
    `fastsae.sae.token_gradients`. A draw is one token, or one dialogue, whose gradient is the mean of its tokens'. Tokens of
    one dialogue resemble each other, so that ratios per token times its length overstate those per dialogue.

    Training brings the mean gradient on its own data to 0, so that the ratios of a trained SAE are as a rule higher on other
    data. To compare ways of training, measure each SAE on the kind of data that it is trained on, at the same step.

    Args:
        sae: The SAE.
        residual: Model and layer.
        batches: Whole dialogues, or whatever else the SAE is trained on: blocks, packed rows.
        term: The sparsity term of the loss.
        max_norm_multiple: How many times longer than the median token an attention sink is.
        n_sampled: Features whose weights have gradients of whole dialogues.
        seed: Draws them.
        n_dialogues: Number of dialogues in `batches`, for the progress bar.
        progress: Show a progress bar.

    Returns:
        Numbers ready for JSON: `coefficient` of the sparsity term, `tokens`, `dialogues`, `live_features` (those that fire on
        one of the tokens), `sampled_features`, and under `per_token` and `per_dialogue` for each parameter what
        `Moments.summary` gives.

    Raises:
        UsageError: The SAE's width is not that of the residual stream, or there are fewer than two tokens.
        FastsaeError: An activation is NaN or infinite.
    """
    if sae.d_in != residual.d_in:
        raise UsageError(f"expected an SAE of activations of width {residual.d_in}, got one of width {sae.d_in}")
    moments = GradientMoments(sae, term, n_sampled=n_sampled, seed=seed)
    with bar("gradients", "dialogue", total=n_dialogues, progress=progress) as advance:
        first, served = itertools.tee(batches)
        is_sink = SinkRule.of_layers([residual], first, max_norm_multiple)[0]
        del first  # so that `tee` does not keep the batches that follow
        for batch in served:
            mask = batch.attention_mask.bool()
            acts = residual(batch.input_ids, mask, *((batch.positions,) if batch.is_packed else ()))
            x = acts[mask.to(acts.device)]
            sinks = is_sink(x, batch.context_positions[mask].to(x.device))
            moments.add(x[~sinks].to(sae.device), batch.dialogue_ids[mask].to(x.device)[~sinks])
            advance(len(mask))
    if moments.n_tokens < 2:
        raise UsageError(f"gsnr: expected two tokens at least, got {moments.n_tokens}")
    return moments.result()
