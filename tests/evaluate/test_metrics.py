"""Reconstruction metrics against numbers worked out by hand: d_in 2, one class of special tokens, features fire as listed."""

import pytest
import torch

from fastsae.evaluate.metrics import ReconstructionSums, log2, ratio
from fastsae_kernels import SparseActs

SPECIAL, WORD = 0, 1  # classes of tokens


def sparse(rows: list[dict[int, float]], d_sae: int = 4) -> SparseActs:
    """Features of each token, as {feature: activation}."""
    offsets = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()], dtype=torch.int32)
    indices = torch.tensor([j for row in rows for j in sorted(row)], dtype=torch.int32)
    values = torch.tensor([row[j] for row in rows for j in sorted(row)])
    return SparseActs(offsets, indices, values, (len(rows), d_sae))


def sums_of(x, sae_out, lengths, kinds=None, acts=None, n_special=1, sinks=()) -> ReconstructionSums:
    """Adds dialogues of the given lengths in one call; position 0 and the tokens listed in `sinks` are sinks."""
    x, sae_out = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(sae_out, dtype=torch.float32)
    n = len(x)
    sums = ReconstructionSums(x.shape[1], 4, n_special)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    is_sink = positions == 0
    is_sink[list(sinks)] = True
    special = torch.tensor(kinds) if kinds else torch.full((n,), n_special)
    sums.add(x, sae_out, acts or sparse([{}] * n), special=special, sinks=is_sink, positions=positions, rows=rows)
    return sums


def test_perfect_reconstruction_has_no_error():
    x = torch.randn(6, 5)
    metrics = sums_of(x, x, [2, 4], [SPECIAL, WORD] * 3).metrics()
    for name in ("mse", "special_mse", "mse_micro", "mse_with_sinks", "fvu", "special_fvu", "mse_sinks"):
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
    assert metrics["fvu_sinks"] == pytest.approx(1, abs=1e-12)


def test_macro_average_counts_dialogues_and_micro_average_counts_tokens():
    # squared errors per element: dialogue 0: 8, 2; dialogue 1: 0, 0, 2, 0
    error = torch.tensor([[4.0, 0], [0, 2], [0, 0], [0, 0], [2, 0], [0, 0]])
    x = torch.randn(6, 2)
    ids = [SPECIAL, WORD, WORD, WORD, SPECIAL, SPECIAL]
    metrics = sums_of(x, x + error, [2, 4], ids).metrics()
    assert metrics["mse_with_sinks"] == pytest.approx((5 + 0.5) / 2)
    assert metrics["mse_with_sinks_log2"] == pytest.approx(torch.tensor(2.75).log2().item())
    assert metrics["special_mse_with_sinks"] == pytest.approx((8 + 1) / 2)
    assert metrics["special_mse_with_sinks_log2"] == pytest.approx(torch.tensor(4.5).log2().item())
    assert metrics["mse"] == pytest.approx((2 + 2 / 3) / 2)
    assert metrics["mse_log2"] == pytest.approx(torch.tensor(4 / 3).log2().item())
    assert metrics["mse_micro"] == pytest.approx(4 / 4)
    # dialogue 0 has a special token at position 0 only and so is no part of this mean
    assert metrics["special_mse"] == pytest.approx(1)
    assert metrics["special_mse_log2"] == 0
    assert metrics["special_mse_micro"] == pytest.approx(1)
    assert metrics["mse_sinks"] == pytest.approx((8 + 0) / 2)


def test_fvu_leaves_position_0_out_of_error_variance_and_mean():
    x = torch.tensor([[1000.0, 0], [1, 0], [3, 0]])
    out = torch.tensor([[0.0, 0], [1, 1], [3, 0]])
    metrics = sums_of(x, out, [3]).metrics()
    assert metrics["fvu"] == pytest.approx(1 / 2)  # error 1; variance about the mean 2: 1 + 1
    assert metrics["fvu_sinks"] == pytest.approx(1000**2 / 998**2)
    assert metrics["norm_sinks"] == pytest.approx(1000)
    assert metrics["norm"] == pytest.approx(2)
    assert (metrics["sinks"], metrics["sinks_beyond_position_0"]) == (1, 0)


def test_sinks_inside_a_dialogue_count_as_position_0_does():
    """Two dialogues; the second token of the first and the last of the second are sinks, the latter a special token."""
    x = torch.tensor([[900.0, 0], [0, 800], [1, 0], [3, 0], [0, 700], [2, 2], [2, -2], [-600, 0]])
    error = torch.tensor([[9.0, 0], [0, 8], [0, 1], [1, 0], [7, 0], [0, 2], [0, 0], [0, 6]])
    kinds = [SPECIAL, WORD, SPECIAL, WORD, SPECIAL, WORD, SPECIAL, SPECIAL]
    acts = sparse([{3: 1.0}, {3: 2.0}, {0: 4.0}, {}, {3: 1.0}, {0: 1.0, 1: 1.0}, {}, {2: 5.0}])
    sums = sums_of(x, x + error, [4, 4], kinds, acts, sinks=[1, 7])
    metrics = sums.metrics()
    # left: (1, 0), (3, 0), (2, 2), (2, -2) with the mean (2, 0), squared distances 1, 1, 4, 4 and squared errors 1, 1, 4, 0
    assert metrics["fvu"] == pytest.approx(6 / 10)
    assert metrics["special_fvu"] == pytest.approx(1 / 5)
    assert metrics["mse"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["special_mse"] == pytest.approx((0.5 + 0) / 2)
    assert metrics["mse_with_sinks"] == pytest.approx(((81 + 64 + 1 + 1) / 8 + (49 + 4 + 0 + 36) / 8) / 2)
    assert metrics["special_mse_with_sinks"] == pytest.approx(((81 + 1) / 4 + (49 + 0 + 36) / 6) / 2)
    assert metrics["mse_micro"] == pytest.approx(6 / 8)
    assert metrics["special_mse_micro"] == pytest.approx(1 / 4)
    assert (metrics["l0"], metrics["l0_special"]) == (0.75, 0.5)
    assert metrics["dead_share"] == 0.5  # features 2 and 3 fire on sinks only
    assert metrics["mse_sinks"] == pytest.approx((81 + 64 + 49 + 36) / 8)
    assert metrics["norm_sinks"] == pytest.approx(750)
    assert metrics["fvu_sinks"] == pytest.approx(230 / (898**2 + (800**2 + 4) + (700**2 + 4) + 602**2))
    assert (metrics["sinks"], metrics["sinks_beyond_position_0"]) == (4, 2)
    assert (metrics["tokens"], metrics["dialogues"]) == (8, 2)
    assert sums.feature_counts.tolist() == [2, 1, 0, 0]
    assert sums.special_acts.tolist() == [[4, 0, 0, 0]]
    special, other, last = sums.token_table(["<|im_start|>"])
    assert (special["count"], other["count"], last["count"]) == (2, 2, 4)
    assert (special["token"], other["token"], last["token"]) == ("<|im_start|>", "all other tokens", "attention sinks")
    assert last["mse"] == metrics["mse_sinks"]
    assert special["fvu"] == metrics["special_fvu"]


def test_where_every_token_is_a_sink_the_headline_is_undefined():
    x = torch.tensor([[3.0, 4.0], [0, 5], [5, 0]])
    kinds = [SPECIAL, WORD, SPECIAL]
    metrics = sums_of(x, x + 2, [1, 2], kinds, sparse([{0: 1.0}] * 3), sinks=[0, 1, 2]).metrics()
    of_sinks = {"mse_with_sinks", "mse_with_sinks_log2", "special_mse_with_sinks", "special_mse_with_sinks_log2"}
    of_sinks |= {"mse_sinks", "norm_sinks", "fvu_sinks", "sinks", "sinks_beyond_position_0", "tokens", "dialogues"}
    assert {name for name, value in metrics.items() if value is not None} == of_sinks
    assert metrics["mse_with_sinks"] == metrics["special_mse_with_sinks"] == metrics["mse_sinks"] == 4
    assert (metrics["norm_sinks"], metrics["sinks"], metrics["sinks_beyond_position_0"]) == (5, 3, 1)
    assert metrics["fvu_sinks"] == pytest.approx(24 / 75)  # no other token has a mean, so distances are from zero


def test_sums_over_batches_equal_one_batch():
    x, out = torch.randn(7, 3), torch.randn(7, 3)
    ids = [SPECIAL, WORD, SPECIAL, WORD, WORD, SPECIAL, WORD]
    acts = [{0: 1.0}, {1: 2.0}, {0: 1.0, 2: 0.5}, {}, {1: 1.0}, {2: 3.0}, {2: 1.0}]
    whole = sums_of(x, out, [4, 3], ids, sparse(acts))
    parts = ReconstructionSums(3, 4, 1)
    for part in (slice(0, 4), slice(4, 7)):
        n = len(x[part])
        positions = torch.arange(n)
        rows, special = torch.zeros(n, dtype=torch.int64), torch.tensor(ids[part])
        options = {"special": special, "sinks": positions == 0, "positions": positions, "rows": rows}
        parts.add(x[part], out[part], sparse(acts[part]), **options)
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
        {"token": "<|im_start|>", "count": 2, "mse": 2.5, "fvu": 10 / 8, "l0": 1, "norm": 4}
    )
    assert (other["token"], other["count"]) == ("all other tokens", 3)
    assert other["fvu"] == pytest.approx(2 / 8)
    assert (first["token"], first["count"], first["mse"], first["norm"]) == ("attention sinks", 1, 1, 50)


def test_undefined_metrics_are_none():
    metrics = sums_of(torch.ones(2, 2), torch.zeros(2, 2), [1, 1], n_special=0).metrics()
    for name in ("mse", "special_mse", "special_mse_with_sinks", "fvu", "special_fvu", "l0", "dead_share"):
        assert metrics[name] is None, name
    assert metrics["mse_with_sinks"] == 1
    constant = sums_of(torch.full((4, 2), 0.1), torch.zeros(4, 2), [4]).metrics()
    assert constant["fvu"] is None  # no variance to explain
    assert ratio(1, 0) is None
    assert ratio(float("nan"), 1) is None
    assert log2(None) is None


def test_fvu_stays_exact_far_from_the_origin():
    x = torch.randn(5000, 3, dtype=torch.float64) + 1e4
    out = x + 0.1 * torch.randn_like(x)
    sums = ReconstructionSums(3, 4, 0)
    zeros = torch.zeros(5000, dtype=torch.int64)
    options = {"special": zeros, "sinks": zeros > 0, "positions": zeros + 1, "rows": zeros}
    sums.add(x, out, sparse([{}] * 5000), **options)
    expected = (x - out).square().sum() / (x - x.mean(0)).square().sum()
    assert sums.metrics()["fvu"] == pytest.approx(expected.item(), rel=1e-6)
