"""What the ops and their backends hand to each other: options, entries, tensors of a pass, outputs, gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsae_kernels.memory import Spare

Penalty = Literal["l0", "l1", "tanh"]


@dataclass(frozen=True)
class AutoencodeSpec:
    """Options of `autoencode`; hashable, so that kernels specialise on it.

    Args:
        bandwidth: Width of the straight-through window around the threshold, in activation units; 0 means no window
            (a plain ReLU or a frozen threshold).
        k: At most the `k` largest active features of a token survive; None keeps every active one.
        batch_topk: `k` is an average: the `k * N` largest active entries of the whole batch survive (BatchTopK).
        penalty: The sparsity term per token: `l0` counts active features (straight-through gradient), `l1` sums
            `feature_acts * feature_scale`, `tanh` sums `tanh(tanh_scale * feature_acts * feature_scale)`.
        tanh_scale: Slope of the `tanh` penalty.
        ste_to_input: Let the straight-through estimate reach the encoder and the input too, not the threshold alone
            (Anthropic, January 2025).

    Raises:
        ValueError: A field is out of its range.
    """

    bandwidth: float = 0.0
    k: int | None = None
    batch_topk: bool = False
    penalty: Penalty = "l0"
    tanh_scale: float = 4.0
    ste_to_input: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.bandwidth < math.inf:  # a graph may hold a symbol here, which math.isfinite refuses
            raise ValueError(f"bandwidth: expected a finite number >= 0, got {self.bandwidth}")
        if self.k is not None and (not isinstance(self.k, Integral) or self.k < 1):
            raise ValueError(f"k: expected None or an integer >= 1, got {self.k!r}")
        if self.batch_topk and self.k is None:
            raise ValueError("k: expected an integer >= 1 with batch_topk, got None")
        if self.batch_topk and self.bandwidth:
            raise ValueError(
                f"bandwidth: expected 0 with batch_topk, whose threshold is not trained, got {self.bandwidth}"
            )
        if self.penalty not in get_args(Penalty):
            raise ValueError(f"penalty: expected one of {', '.join(get_args(Penalty))}, got {self.penalty!r}")
        if not 0 < self.tanh_scale < math.inf:
            raise ValueError(f"tanh_scale: expected a finite number > 0, got {self.tanh_scale}")


class FeatureMajor(NamedTuple):
    """The same entries ordered by feature, then token; what a weight gradient walks."""

    offsets: Tensor  # [d_sae + 1] int32; feature j owns entries offsets[j] .. offsets[j + 1]
    tokens: Tensor  # [nnz] int32
    values: Tensor  # [nnz]


@dataclass
class SparseActs:
    """Feature activations of `n_tokens` tokens, only the entries that are used, in CSR order.

    Row `n` owns the entries `row_offsets[n] .. row_offsets[n] + row_counts[n]`, sorted by feature index. A packed
    structure (`row_counts is None`) has no gaps. Kernels with a fixed capacity leave entries with index 0 and value 0
    behind a row's last one; these are safe to gather and add nothing. In training an entry inside the lower half of
    the straight-through window is listed too, with value 0: thresholds are non-negative, so active means value > 0.

    Args:
        row_offsets: `[n_tokens + 1]`, int32 or int64.
        indices: `[nnz]` feature of each entry, int32.
        values: `[nnz]` activation of each entry, in activation units.
        shape: `(n_tokens, d_sae)`.
        row_counts: `[n_tokens]` valid entries of each row, or None when packed.
        feature_major: The same entries by feature, where the producer has them at no cost.
    """

    row_offsets: Tensor
    indices: Tensor
    values: Tensor
    shape: tuple[int, int]
    row_counts: Tensor | None = None
    feature_major: FeatureMajor | None = None

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.values.device

    def row_ids(self) -> Tensor:
        """Token of each stored entry, `[nnz]` int64 (padding included)."""
        counts = self.row_offsets.diff()
        rows = torch.arange(self.shape[0], device=self.device)
        return rows.repeat_interleave(counts, output_size=self.indices.numel())

    def valid(self) -> Tensor | None:
        """`[nnz]` bool, False on padding; None when the structure is packed."""
        if self.row_counts is None:
            return None
        rows = self.row_ids()
        slot = torch.arange(self.indices.numel(), device=self.device) - self.row_offsets[rows]
        return slot < self.row_counts[rows]

    def packed(self) -> SparseActs:
        """The same entries without padding; a host synchronisation on a GPU."""
        valid = self.valid()
        if valid is None:
            return self
        return self.select(valid)

    def active(self) -> SparseActs:
        """Only the entries with a positive value, packed: what an inference user wants of a training encode."""
        return self.select(self.values > 0)

    def select(self, keep: Tensor) -> SparseActs:
        """The entries where `keep` (`[nnz]` bool) is True, packed; order is kept."""
        counts = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)
        counts.index_add_(0, self.row_ids(), keep.to(torch.int64))
        row_offsets = torch.zeros_like(self.row_offsets)
        row_offsets[1:] = counts.cumsum(0)
        return SparseActs(row_offsets, self.indices[keep], self.values[keep], self.shape)

    def divided(self, divisor: Tensor) -> SparseActs:
        """The same entries, each value divided by the `divisor` (`[d_sae]`) of its feature; those that are 0 stay 0."""
        major = self.feature_major
        if major is not None:
            of_entries = divisor.repeat_interleave(major.offsets.diff(), output_size=major.values.numel())
            major = major._replace(values=_quotient(major.values, of_entries))
        values = _quotient(self.values, divisor.index_select(0, self.indices))
        return replace(self, values=values, feature_major=major)

    def l0(self) -> Tensor:
        """Active features of each token, `[n_tokens]` int64."""
        counts = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)
        return counts.index_add_(0, self.row_ids(), (self.values > 0).to(torch.int64))

    def to_dense(self) -> Tensor:
        """`[n_tokens, d_sae]` in the dtype of `values`; allocates the dense tensor, for inspection and small inputs."""
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.device)
        # padding adds zeros at feature 0, so accumulation leaves a real entry there untouched
        return dense.index_put_((self.row_ids(), self.indices.long()), self.values, accumulate=True)

    def topk(self, k: int) -> SparseActs:
        """The `k` largest active entries of each row (all, where fewer are active), packed; ties to the lower feature.

        Raises:
            ValueError: `k` is below 1.
        """
        if not isinstance(k, Integral) or k < 1:
            raise ValueError(f"k: expected an integer >= 1, got {k!r}")
        acts = self.active()
        return acts.select(topk_mask(acts.row_ids(), acts.values.detach(), acts.row_offsets, k))


def _quotient(values: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(values == 0, 0, values / divisor)


def topk_mask(rows: Tensor, values: Tensor, row_offsets: Tensor, k: int) -> Tensor:
    """Which entries survive top-k: `keep = rank < k or the row has at most k active entries`.

    Args:
        rows: `[nnz]` row of each entry, ascending; inside a row by feature index.
        values: `[nnz]`, 0 where an entry is in the window only.
        row_offsets: `[n_tokens + 1]` of the same entries.
        k: How many active entries survive; ties go to the lower feature index.

    Returns:
        `[nnz]` bool in the order of the entries.
    """
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - row_offsets[rows[order]].long()
    n_active = torch.zeros(row_offsets.numel() - 1, dtype=torch.int64, device=values.device)
    n_active.index_add_(0, rows.long(), (values > 0).long())
    return (rank < k) | (n_active[rows] <= k)


class PassInputs(NamedTuple):
    """The tensors of one pass over N tokens, checked and flattened by the ops; strides are free."""

    x: Tensor  # [N, d_in] fp32, bf16, fp16 or fp64
    W_enc: Tensor  # [d_in, d_sae] in the dtype of x
    b_enc: Tensor  # [d_sae] in the dtype of x, or fp32 beside 16 bits; so b_dec too
    threshold: Tensor  # [d_sae] fp32 (fp64 for fp64 inputs), >= 0
    W_dec: Tensor  # [d_sae, d_out]
    b_dec: Tensor  # [d_out]
    feature_scale: Tensor | None = None  # [d_sae] like threshold: weights of the l1 and tanh penalties; None for ones
    target: Tensor | None = None  # [N, d_out] in a floating dtype of its own: the pass then returns the residual
    rank_scale: Tensor | None = None  # [d_sae] like threshold, >= 0: gate and top-k look at hidden_pre times it

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.x.device

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def with_contiguous_vectors(self) -> PassInputs:
        """The same tensors, those of one dimension contiguous: Triton's kernels take them as pointers without a stride."""
        names = ("b_enc", "threshold", "b_dec", "feature_scale", "rank_scale")
        vectors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return self._replace(**{name: vector.contiguous() for name, vector in vectors.items()})


class Capacity(NamedTuple):
    """Entries for which a pass reserves room. Where there are more the result is the same, and slower."""

    row: int  # of a single row
    mean: int  # of all rows together, per row: so one token with many raises nothing for the others


class AutoencodeOutput(NamedTuple):
    """One forward pass over N tokens."""

    sae_out: Tensor  # [N, d_out] in the input's dtype, the reconstruction; less the target, where one is given
    penalty: Tensor  # [N] fp32 (fp64 for fp64 inputs)
    l0: Tensor  # [N] int64, active features of each token
    feature_counts: Tensor  # [d_sae] int64, tokens on which each feature is active
    acts: SparseActs | None  # the entries; None where none were kept for the caller
    min_active: Tensor | None = None  # [] fp32, the smallest that survived top-k, inf without one; BatchTopK only
    squared_error: Tensor | None = None  # [N] fp32 (fp64 for fp64 inputs), of the residual; only with a target


class Overflow(NamedTuple):
    """The rows with more entries than their capacity, known on the device alone."""

    rows: Tensor  # [N] int64: the overflowing rows first
    n_rows: Tensor  # [1] int32: how many they are


class Kept(NamedTuple):
    """What a forward pass keeps for its backward beside its inputs."""

    acts: SparseActs | None  # None: the dense backend ran
    hidden_pre: Tensor | None = None  # [d_sae, N], what the dense backend keeps of a small pass
    overflow: Overflow | None = None  # None: no row can have overflowed
    listed: Tensor | None = None  # [N]: entries that each row wanted to hold, where that sizes the next pass


class KeptSize(NamedTuple):
    """The size of `Kept` in a compiled graph, where it must not depend on the data."""

    entries: int
    overflows: bool  # whether rows can overflow


class OutputGrads(NamedTuple):
    """The gradients that reach a pass: that of row n of `sae_out` is `row_scale[n] * rows[n]`."""

    rows: Tensor  # [N, d_out] in the dtype of x
    row_scale: Tensor | None  # [N] fp32 (fp64 for fp64 inputs), any stride; None for ones
    penalty: Tensor  # [N] fp32 (fp64 for fp64 inputs), any stride


@dataclass(frozen=True)
class AutoencodeNeeds:
    """Which of the large gradients are asked for: a frozen SAE between a model's layers needs none of its own."""

    x: bool = True
    W_enc: bool = True
    W_dec: bool = True
    weight_dtype: torch.dtype | None = None  # a wider one of the weights, to which a CPU need not round their gradients
    spares: tuple[Spare, Spare] | None = None  # where a CPU puts the gradients of W_enc and W_dec


class AutoencodeGrads(NamedTuple):
    """Gradients of one pass, each with the shape of its parameter; None where not asked for."""

    x: Tensor | None
    W_enc: Tensor | None
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor | None
    b_dec: Tensor
    feature_scale: Tensor | None
