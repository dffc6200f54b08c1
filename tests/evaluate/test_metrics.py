"""Reconstruction metrics against numbers worked out by hand: d_in 2, special token 7, features fire as listed."""

import pytest
import torch

from fastsae.evaluate.metrics import ReconstructionSums, log2, ratio
from fastsae_kernels import SparseActs

SPECIAL, WORD = 7, 1


def sparse(rows: list[dict[int, float]], d_sae: int = 4) -> SparseActs:
    """Features of each token, as {feature: activation}."""
    offsets = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()], dtype=torch.int32)
    indices = torch.tensor([j for row in rows for j in sorted(row)], dtype=torch.int32)
    values = torch.tensor([row[j] for row in rows for j in sorted(row)])
    return SparseActs(offsets, indices, values, (len(rows), d_sae))


def sums_of(x, sae_out, lengths, token_ids=None, acts=None, special_ids=(SPECIAL,)) -> ReconstructionSums:
    """Adds dialogues of the given lengths in one call."""
    x, sae_out = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(sae_out, dtype=torch.float32)
    n = len(x)
    sums = ReconstructionSums(x.shape[1], 4, special_ids)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    token_ids = torch.tensor(token_ids or [WORD] * n)
    sums.add(x, sae_out, acts or sparse([{}] * n), token_ids, positions, rows)
    return sums


def test_perfect_reconstruction_has_no_error():
    x = torch.randn(6, 5)
    metrics = sums_of(x, x, [2, 4], [SPECIAL, WORD] * 3).metrics()
    for name in ("mse", "special_mse", "mse_micro", "mse_without_position_0", "fvu", "mse_position_0"):
        assert metrics[name] == 0
    assert metrics["explained_variance"] == 1
    assert metrics["mse_log2"] is None  # the logarithm of 0 is not JSON
    assert (metrics["tokens"], metrics["dialogues"]) == (6, 2)


def test_the_mean_as_reconstruction_has_fvu_one():
    x = torch.tensor([[100.0, 0], [1, 2], [3, 4], [5, 9], [-50, 0], [7, 1]])
    late = [1, 2, 3, 5]
    mean = x[late].mean(0).expand(6, 2)
    metrics = sums_of(x, mean, [4, 2]).metrics()
    assert metrics["fvu"] == pytest.approx(1, abs=1e-12)
    assert metrics["fvu_position_0"] == pytest.approx(1, abs=1e-12)


def test_macro_average_counts_dialogues_and_micro_average_counts_tokens():
    # squared errors per element: dialogue 0: 8, 2; dialogue 1: 0, 0, 2, 0
    error = torch.tensor([[4.0, 0], [0, 2], [0, 0], [0, 0], [2, 0], [0, 0]])
    x = torch.randn(6, 2)
    ids = [SPECIAL, WORD, WORD, WORD, SPECIAL, SPECIAL]
    metrics = sums_of(x, x + error, [2, 4], ids).metrics()
    assert metrics["mse"] == pytest.approx((5 + 0.5) / 2)
    assert metrics["mse_log2"] == pytest.approx(torch.tensor(2.75).log2().item())
    assert metrics["mse_micro"] == pytest.approx(12 / 6)
    assert metrics["special_mse"] == pytest.approx((8 + 1) / 2)
    assert metrics["special_mse_log2"] == pytest.approx(torch.tensor(4.5).log2().item())
    assert metrics["special_mse_micro"] == pytest.approx(10 / 3)
    assert metrics["mse_without_position_0"] == pytest.approx((2 + 2 / 3) / 2)
    # dialogue 0 has a special token at position 0 only and so is no part of this mean
    assert metrics["special_mse_without_position_0"] == pytest.approx(1)
    assert metrics["mse_position_0"] == pytest.approx((8 + 0) / 2)


def test_fvu_leaves_position_0_out_of_error_variance_and_mean():
    x = torch.tensor([[1000.0, 0], [1, 0], [3, 0]])
    out = torch.tensor([[0.0, 0], [1, 1], [3, 0]])
    metrics = sums_of(x, out, [3]).metrics()
    assert metrics["fvu"] == pytest.approx(1 / 2)  # error 1; variance about the mean 2: 1 + 1
    assert metrics["fvu_position_0"] == pytest.approx(1000**2 / 998**2)
    assert metrics["norm_position_0"] == pytest.approx(1000)
    assert metrics["norm_without_position_0"] == pytest.approx(2)


def test_sums_over_batches_equal_one_batch():
    x, out = torch.randn(7, 3), torch.randn(7, 3)
    ids = [SPECIAL, WORD, SPECIAL, WORD, WORD, SPECIAL, WORD]
    acts = [{0: 1.0}, {1: 2.0}, {0: 1.0, 2: 0.5}, {}, {1: 1.0}, {2: 3.0}, {2: 1.0}]
    whole = sums_of(x, out, [4, 3], ids, sparse(acts))
    parts = ReconstructionSums(3, 4, [SPECIAL])
    for part in (slice(0, 4), slice(4, 7)):
        n = len(x[part])
        inputs = (x[part], out[part], sparse(acts[part]), torch.tensor(ids[part]), torch.arange(n))
        parts.add(*inputs, torch.zeros(n, dtype=torch.int64))
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-12)
    assert torch.equal(parts.feature_counts, whole.feature_counts)


def test_l0_and_dead_share_leave_position_0_out():
    acts = sparse([{0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0}, {0: 2.0, 3: 1.0}])
    sums = sums_of(torch.randn(3, 2), torch.randn(3, 2), [3], [SPECIAL, SPECIAL, WORD], acts)
    metrics = sums.metrics()
    assert metrics["l0"] == 1.5
    assert metrics["l0_special"] == 1
    assert metrics["dead_share"] == 0.5  # features 1 and 2 fire at position 0 only
    assert sums.feature_counts.tolist() == [2, 0, 0, 1]
    assert sums.special_counts.tolist() == [1, 0, 0, 0]
    assert sums.special_acts.tolist() == [[1, 0, 0, 0]]


def test_token_table():
    x = torch.tensor([[50.0, 0], [2, 0], [6, 0], [4, 0], [4, 2], [4, -2]])
    out = x + torch.tensor([[1.0, 1], [1, 0], [3, 0], [0, 0], [0, 1], [0, 1]])
    acts = sparse([{0: 1.0}, {0: 1.0, 1: 1.0}, {}, {1: 1.0}, {}, {}])
    sums = sums_of(x, out, [6], [SPECIAL, SPECIAL, SPECIAL, WORD, WORD, WORD], acts)
    special, other, first = sums.token_table(["<|im_start|>"])
    # the mean is (4, 0); squared distances of the special tokens are 4 and 4, their squared errors 1 and 9
    assert special == pytest.approx(
        {"token": "<|im_start|>", "id": SPECIAL, "count": 2, "mse": 2.5, "fvu": 10 / 8, "l0": 1, "norm": 4}
    )
    assert (other["token"], other["id"], other["count"]) == ("all other tokens", None, 3)
    assert other["fvu"] == pytest.approx(2 / 8)
    assert (first["token"], first["count"], first["mse"], first["norm"]) == ("position 0", 1, 1, 50)


def test_undefined_metrics_are_none():
    metrics = sums_of(torch.ones(2, 2), torch.zeros(2, 2), [1, 1], special_ids=()).metrics()
    for name in ("special_mse", "special_mse_log2", "fvu", "l0", "l0_special", "dead_share", "explained_variance"):
        assert metrics[name] is None, name
    assert metrics["mse"] == 1
    constant = sums_of(torch.full((4, 2), 0.1), torch.zeros(4, 2), [4]).metrics()
    assert constant["fvu"] is None  # no variance to explain
    assert ratio(1, 0) is None
    assert ratio(float("nan"), 1) is None
    assert log2(None) is None


def test_fvu_stays_exact_far_from_the_origin():
    x = torch.randn(5000, 3, dtype=torch.float64) + 1e4
    out = x + 0.1 * torch.randn_like(x)
    sums = ReconstructionSums(3, 4, [])
    zeros = torch.zeros(5000, dtype=torch.int64)
    sums.add(x, out, sparse([{}] * 5000), zeros, zeros + 1, zeros)
    expected = (x - out).square().sum() / (x - x.mean(0)).square().sum()
    assert sums.metrics()["fvu"] == pytest.approx(expected.item(), rel=1e-6)
