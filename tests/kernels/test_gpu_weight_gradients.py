"""What a GPU pass leaves for the optimiser, against dense sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_helpers import DEVICE, few_programs_here, needs_kernels
from torch import Tensor

from fastsae_kernels import SparseActs

pytestmark = needs_kernels

N_TOKENS, N_FEATURES, D_IN, CAPACITY = 6, 7, 10, 4


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    with few_programs_here():
        yield


def make_acts() -> SparseActs:
    """Rows of one length, whose last slots are padding."""
    counts = torch.tensor([4, 0, 2, 3, 1, 4])
    valid = torch.arange(CAPACITY) < counts[:, None]
    indices = torch.stack([torch.randperm(N_FEATURES)[:CAPACITY].sort().values for _ in counts])
    values = torch.rand(N_TOKENS, CAPACITY) * valid
    tensors = (torch.arange(0, N_TOKENS * CAPACITY + 1, CAPACITY), (indices * valid).flatten().int(), values.flatten())
    return SparseActs(*(t.to(DEVICE) for t in tensors), (N_TOKENS, N_FEATURES), counts.to(DEVICE))


@pytest.mark.parametrize("n", [1, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_clears_where_the_flag_is_set(dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import weight_gradients

    monkeypatch.setattr(weight_gradients, "CLEARING_PROGRAMS", 2)
    monkeypatch.setattr(weight_gradients, "CLEARED_BLOCK", 1024)  # several blocks for one program
    guarded = torch.full((n + 1,), torch.nan, dtype=dtype, device=DEVICE)
    for flag in (0, 1, 2):
        weight_gradients.clear_where(torch.tensor([flag], dtype=torch.int32, device=DEVICE), guarded[:n])
        assert (guarded[:n] == 0).all() if flag else guarded.isnan().all()
        assert guarded[n].isnan()


@pytest.mark.parametrize("n_overflow", [None, 0, 2], ids=lambda n: f"{n} overflowed")
@pytest.mark.parametrize("row_length", [None, CAPACITY], ids=["tokens", "row_length"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled rows"])
def test_share_is_the_dense_gradient(scaled: bool, row_length: int | None, n_overflow: int | None) -> None:
    """Whatever an earlier step left in the buffer."""
    from fastsae_kernels.gpu.feature_sums import feature_order
    from fastsae_kernels.gpu.weight_gradients import gpu_share

    acts, x, grad_out = make_acts(), torch.randn(N_TOKENS, D_IN), torch.randn(N_TOKENS, D_IN + 1)
    row_scale = torch.rand(N_TOKENS) if scaled else None
    valid = acts.valid()
    assert valid is not None
    grad_hidden_pre = torch.randn(acts.values.shape) * valid.cpu()
    buffer = torch.full((N_FEATURES * (2 * D_IN + 1),), torch.nan, device=DEVICE)
    flag = None if n_overflow is None else torch.tensor([n_overflow], dtype=torch.int32, device=DEVICE)
    share = gpu_share(
        feature_order(acts, row_length),
        acts.values,
        grad_hidden_pre.to(DEVICE),
        x.to(DEVICE),
        grad_out.to(DEVICE),
        None if row_scale is None else row_scale.to(DEVICE),
        flag,
        None if flag is None else buffer,
    )
    scaled_rows = grad_out if row_scale is None else grad_out * row_scale[:, None]
    wanted = [dense_of(acts, grad_hidden_pre).t() @ x, acts.to_dense().cpu().t() @ scaled_rows]
    for sums, want in zip(share, wanted, strict=True):
        if n_overflow:  # the pass adds these to zeros
            assert sums.extra is not None
            sums.extra.add_(3.0)
            want = want + 3.0
        torch.testing.assert_close(sums.dense().cpu(), want)


def dense_of(acts: SparseActs, per_entry: Tensor) -> Tensor:
    """`[N, d_sae]` fp32 of numbers per entry."""
    dense = torch.zeros(acts.shape)
    return dense.index_put_((acts.row_ids().cpu(), acts.indices.long().cpu()), per_entry, accumulate=True)
