"""Leakage: how far block training moves a token's activation, and the gradient that it gives, by text that is not its own.

The same SAE and the same tokens go three ways through the model: each dialogue alone, in blocks, and packed into rows where
dialogues do not see each other. For a token with the gradient g of a parameter

    leak = |g_there - g_alone|^2 / |g_alone|^2

and the same of its activation; 2 is the leak of an unrelated gradient of the same length. The packed rows are the control: there
a leak is what the model's numbers are rounded by. Gradients of one token are of rank one, so that all products of two of them
come from entries and vectors of the token. The difference is one of such products in float64, which resolves leaks down to
1e-15 or so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream, n_embeddings
from fastsae.data.model_dtype import dtype_name
from fastsae.data.packing import check_packing
from fastsae.data.progress import bar
from fastsae.data.sequencing import BlockSequencer, FastSequencer, PackedSequencer, TokenBatch
from fastsae.data.sinks import MAX_NORM_MULTIPLE, SinkRule
from fastsae.errors import UsageError
from fastsae.evaluate.metrics import ratio
from fastsae.sae import SparseAutoencoder
from fastsae.sae.token_gradients import SparsityTerm, TokenGradients, token_gradients

# Where a token's dialogue begins: with the block, in it behind another dialogue, or before it, so that its start is cut off.
PLACES = ("begins_the_block", "begins_behind_another", "begins_before_the_block")


class _Tokens(NamedTuple):
    """Tokens of some batches in one order."""

    x: Tensor  # [N, d_in]
    dialogues: Tensor  # [N] int64
    positions: Tensor  # [N] int64, in the dialogue

    def rows_of(self, others: _Tokens) -> Tensor:
        """`[n_others]`, the row here of each token there.

        Raises:
            KeyError: One of them is not here.
        """
        longest = 1 + int(torch.cat([self.positions, others.positions]).max())
        own, wanted = (tokens.dialogues * longest + tokens.positions for tokens in (self, others))
        own, order = own.sort()
        at = torch.searchsorted(own, wanted).clamp_(max=len(own) - 1)
        if not torch.equal(own[at], wanted):
            raise KeyError("a token of the block is missing among those of its dialogue")
        return order[at]


def _read(residual: ResidualStream, batches: Iterable[TokenBatch]) -> _Tokens:
    """The real tokens of the batches and their activations."""
    parts = []
    for batch in batches:
        mask = batch.attention_mask.bool()
        acts = residual(batch.input_ids, mask, *((batch.positions,) if batch.is_packed else ()))
        parts.append((acts[mask.to(acts.device)], batch.dialogue_ids[mask], batch.positions[mask]))
    return _Tokens(*(torch.cat(column) for column in zip(*parts, strict=True)))


def places(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Where each token of a batch of blocks stands, both `[B, T]` int64.

    Returns:
        How many tokens of its own dialogue precede it in the block, and the index into `PLACES`.
    """
    columns = torch.arange(batch.input_ids.shape[1]).expand(batch.input_ids.shape)
    goes_on = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    goes_on[:, 1:] = batch.dialogue_ids[:, 1:] == batch.dialogue_ids[:, :-1]
    goes_on[:, 1:] &= batch.positions[:, 1:] == batch.positions[:, :-1] + 1
    starts = torch.where(goes_on, 0, columns).cummax(1).values
    is_cut = batch.positions.gather(1, starts) > 0
    return columns - starts, torch.where(is_cut, 2, (starts > 0).long())


def squared_differences(
    sae: SparseAutoencoder, a: TokenGradients, b: TokenGradients
) -> dict[str, tuple[Tensor, Tensor]]:
    """By parameter `|a - b|^2` and `|a|^2`, `[N]` float64, of the gradients of the same tokens in two passes."""
    pairs = {"aa": (a, a), "bb": (b, b), "ab": (a, b)}
    products = {name: _products(sae, *pair) for name, pair in pairs.items()}
    return {
        name: ((of_a + products["bb"][name] - 2 * products["ab"][name]).clamp_min(0), of_a)
        for name, of_a in products["aa"].items()
    }


def _products(sae: SparseAutoencoder, a: TokenGradients, b: TokenGradients) -> dict[str, Tensor]:
    """The product of both gradients of each token, by parameter."""
    n_tokens, d_sae = len(a.x), sae.d_sae
    own, others = (g.tokens * d_sae + g.features for g in (a, b))
    at = torch.searchsorted(others, own).clamp_(max=max(0, len(others) - 1))
    shared = (others[at] == own).nonzero().squeeze(1) if len(others) else own[:0]
    at, tokens = at[shared], a.tokens[shared]

    def sparse(values: Tensor, values_b: Tensor) -> Tensor:
        out = torch.zeros(n_tokens, dtype=torch.float64, device=values.device)
        return out.index_add_(0, tokens, values[shared] * values_b[at])

    acts, hidden_pre = sparse(a.acts, b.acts), sparse(a.hidden_pre, b.hidden_pre)
    found = {
        "W_enc": hidden_pre * torch.linalg.vecdot(a.x, b.x),
        "W_dec": acts * torch.linalg.vecdot(a.error, b.error),
        "b_enc": hidden_pre,
        "b_dec": torch.linalg.vecdot(a.b_dec, b.b_dec),
    }
    if a.threshold is not None and b.threshold is not None:
        found["threshold"] = sparse(a.threshold, b.threshold)
    if a.along is not None and b.along is not None:
        # (acts_a e_a + along_a u) . (acts_b e_b + along_b u), summed over features, with u of length 1
        of_a, of_b = (g.acts * _along_decoder(sae, g) for g in (a, b))
        found["W_dec"] += sparse(of_a, b.along) + sparse(a.along, of_b) + sparse(a.along, b.along)
    return found


def _along_decoder(sae: SparseAutoencoder, gradients: TokenGradients) -> Tensor:
    """`error[n] . W_dec[j] / |W_dec[j]|` of each entry, `[nnz]`."""
    directions, size = torch.nn.functional.normalize(sae.W_dec.double(), dim=1), max(1, 2**22 // sae.d_in)
    parts = [
        torch.linalg.vecdot(gradients.error[tokens], directions[features])
        for tokens, features in zip(gradients.tokens.split(size), gradients.features.split(size), strict=True)
    ]
    return torch.cat(parts)


class _Leaks:
    """What leaks are made of, for all tokens, and where each of them stands."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Adds the next tokens' values of a column, `[N, ...]`; those of a leak are `|there - alone|^2` and `|alone|^2`."""
        self.columns.setdefault(name, []).append(values.cpu())

    def curves(self, way: str) -> dict[str, Any]:
        """Summaries of one way by place and by log2 bins of the distance, and of the sinks."""
        columns = {name: torch.cat(parts) for name, parts in self.columns.items()}
        leaks = {name.removeprefix(way): values for name, values in columns.items() if name.startswith(way)}
        place, sinks = columns["place"], columns["sinks"]
        bins = torch.frexp(columns["distance"].double()).exponent  # 0, 1, 2 to 3, 4 to 7, ...

        def summaries(chosen: Tensor) -> dict[str, Any]:
            return {name: _summary(values[chosen]) for name, values in leaks.items()}

        found: dict[str, Any] = {"sinks": summaries(sinks)}
        for i, name in enumerate(PLACES):
            chosen = (place == i) & ~sinks
            found[name] = {**summaries(chosen), "bins": []}
            for b in bins[chosen].unique().tolist():
                first, last = (2 ** (b - 1), 2**b - 1) if b else (0, 0)
                found[name]["bins"].append({"from": first, "to": last, **summaries(chosen & (bins == b))})
        return found


def _summary(squares: Tensor) -> dict[str, float | int | None]:
    """Of `|there - alone|^2` and `|alone|^2` `[N, 2]`: the ratio of their sums, mean and quartiles of the ratios that exist."""
    difference, whole = squares.unbind(1)
    values = (difference / whole)[whole > 0].numpy()
    pooled, names = ratio(float(difference.sum()), float(whole.sum())), ("lower_quartile", "median", "upper_quartile")
    if values.size == 0:
        return {"tokens": 0, "pooled": pooled, "mean": None, **dict.fromkeys(names)}
    quartiles = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    found = {"tokens": values.size, "pooled": pooled, "mean": float(values.mean())}
    return found | dict(zip(names, quartiles, strict=True))


@torch.no_grad()
def leakage(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    dialogues: Sequence[Any],
    indices: Sequence[int],
    tokenizer: Any,
    term: SparsityTerm,
    *,
    block_length: int,
    max_length: int = 8192,
    batch_tokens: int = 8192,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures leakage on the tokens of the blocks that dialogues fill; what is left of them, less than a block, is not read.

    Args:
        sae: The SAE. A BatchTopK SAE chooses among the entries of the same batch of tokens each way.
        residual: Model and layer.
        dialogues: The dataset.
        indices: Those of its dialogues that make the blocks, in their order.
        tokenizer: The model's.
        term: The sparsity term of the loss.
        block_length: Tokens of a block.
        max_length: Tokens after which a dialogue is cut off.
        batch_tokens: Most tokens of a batch.
        max_norm_multiple: How many times longer than the median token an attention sink is.
        progress: Show a progress bar.

    Returns:
        Numbers ready for JSON: `block_length`, `blocks`, `tokens`, `dialogues`, `sinks`, `coefficient` of the sparsity term, the
        `model_dtype` that the control's leaks are due to, and for the ways `block` and `packed` by place (`PLACES`) and for
        `sinks` the leaks of `activation` and of each parameter's gradient: number of `tokens` that have one, their `mean` and
        quartiles, and `pooled`, the ratio of the sums, which tokens with a small gradient do not disturb. A place has `bins` of
        the number of the dialogue's own tokens that precede the token in its block. Attention sinks, by the library's rule
        either alone or in the block, are left out of the places. `packed` is None for a model that cannot keep packed
        dialogues apart.

    Raises:
        UsageError: The SAE's width is not that of the residual stream, or no block is filled.
        FastsaeError: An activation is NaN or infinite.
    """
    if sae.d_in != residual.d_in:
        raise UsageError(f"expected an SAE of activations of width {residual.d_in}, got one of width {sae.d_in}")
    arguments = tokenizer, max_length, batch_tokens
    options: dict[str, Any] = {"shuffle": False, "endless": False, "n_embeddings": n_embeddings(residual.model)}
    blocks = BlockSequencer(dialogues, indices, *arguments, block_length=block_length, **options)
    is_sink = SinkRule.of_layers(
        [residual], FastSequencer(dialogues, indices, *arguments, **options), max_norm_multiple
    )[0]
    leaks, seen, n_blocks, keeps_apart = _Leaks(), set[int](), 0, True
    with bar("leakage", "block", total=None, progress=progress) as advance:
        for batch in blocks:
            block, own = _read(residual, [batch]), batch.dialogue_ids.unique().tolist()
            if not seen:
                keeps_apart = _keeps_apart(residual, dialogues, own, *arguments, **options)
            ways = {"block": block}
            alone = _read(residual, FastSequencer(dialogues, own, *arguments, **options))
            if keeps_apart:
                ways["packed"] = _read(residual, PackedSequencer(dialogues, own, *arguments, **options))
            _add(leaks, sae, term, is_sink, batch, alone, ways)
            seen |= set(own)
            n_blocks += len(batch.input_ids)
            advance(len(batch.input_ids))
    sinks = torch.cat(leaks.columns["sinks"])
    return {
        "coefficient": float(term.coefficient),
        "model_dtype": dtype_name(residual.model.dtype),
        "block_length": block_length,
        "blocks": n_blocks,
        "tokens": len(sinks),
        "dialogues": len(seen),
        "sinks": int(sinks.sum()),
        "block": leaks.curves("block."),
        "packed": leaks.curves("packed.") if keeps_apart else None,
    }


def _keeps_apart(
    residual: ResidualStream, dialogues: Sequence[Any], indices: Sequence[int], *arguments: Any, **options: Any
) -> bool:
    """Whether the model computes packed dialogues as it computes each of them alone, by the first tokens of one of them."""
    batch = next(FastSequencer(dialogues, indices[:1], *arguments, **options))
    ids = batch.input_ids[0][batch.attention_mask[0]].tolist()[:32]
    try:
        check_packing(residual, ids, ids)
    except UsageError:
        return False
    return True


def _add(
    leaks: _Leaks,
    sae: SparseAutoencoder,
    term: SparsityTerm,
    is_sink: SinkRule,
    batch: TokenBatch,
    alone: _Tokens,
    ways: dict[str, _Tokens],
) -> None:
    """Adds the leaks of a batch of blocks, from its tokens' activations alone and each way."""
    block, mask = ways["block"], batch.attention_mask.bool()
    distance, place = (tensor[mask] for tensor in places(batch))
    x = alone.x[alone.rows_of(block).to(alone.x.device)]
    sinks = is_sink(x, block.positions.to(x.device))
    sinks |= is_sink(block.x, batch.context_positions[mask].to(x.device))
    for name, values in (("distance", distance), ("place", place), ("sinks", sinks)):
        leaks.add(name, values)
    gradients = token_gradients(sae, x.to(sae.device), term)
    for way, tokens in ways.items():
        there = tokens.x[tokens.rows_of(block).to(x.device)]
        difference = (there.double() - x.double()).square().sum(-1)
        leaks.add(f"{way}.activation", torch.stack([difference, x.double().square().sum(-1)], 1))
        others = token_gradients(sae, there.to(sae.device), term)
        for name, pair in squared_differences(sae, gradients, others).items():
            leaks.add(f"{way}.{name}", torch.stack(pair, 1))
