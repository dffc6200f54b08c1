"""`encode_topk` and `encode_features` of every class, against the dense activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsae import (
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedTopKSAE,
    SparseActs,
    SparseAutoencoder,
)
from fastsae.sae.inference import columns, top_activations

D_IN, D_SAE = 12, 40
KINDS: dict[str, tuple[type[SparseAutoencoder], dict[str, Any]]] = {
    "jumprelu": (FusedJumpReLUSAE, {}),
    "jumprelu k=3": (FusedJumpReLUSAE, {"k": 3, "apply_b_dec_to_input": True}),
    "relu": (FusedReLUSAE, {}),
    "relu k=3": (FusedReLUSAE, {"k": 3}),
    "topk": (FusedTopKSAE, {"k": 4}),
    "topk raw": (FusedTopKSAE, {"k": 4, "rescale_acts_by_decoder_norm": False}),
    "batchtopk": (FusedBatchTopKSAE, {"k": 4}),
}


def build(kind: str) -> SparseAutoencoder:
    cls, options = KINDS[kind]
    sae = cls(D_IN, D_SAE, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(D_SAE, generator=g))
        sae.b_dec.copy_(0.3 * torch.randn(D_IN, generator=g))
        sae.W_dec.mul_(torch.rand(D_SAE, 1, generator=g) + 0.5)
        if isinstance(sae, FusedJumpReLUSAE):
            sae.threshold.copy_(0.1 + 0.5 * torch.rand(D_SAE, generator=g))
        if isinstance(sae, FusedBatchTopKSAE):
            sae.topk_threshold.fill_(0.4)
    return sae


def expected_topk(acts: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = acts.sort(dim=-1, descending=True, stable=True)
    values, indices = values[..., :k], indices[..., :k]
    return values, torch.where(values > 0, indices, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(D_IN,), (7, D_IN), (2, 3, D_IN), (0, D_IN)], ids=str)
@pytest.mark.parametrize("k", [1, 4, D_SAE])
def test_encode_topk(kind: str, shape: tuple[int, ...], k: int) -> None:
    sae, x = build(kind), torch.randn(*shape)
    values, indices = sae.encode_topk(x, k)
    want_values, want_indices = expected_topk(sae.encode(x), k)
    assert indices.dtype == torch.int64
    assert values.shape == indices.shape == (*shape[:-1], k)
    torch.testing.assert_close(values, want_values)
    assert torch.equal(indices, want_indices)


def test_ties_go_to_the_lower_feature_and_the_rest_is_padded() -> None:
    sae = FusedReLUSAE(2, 5)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 2.0, 2.0, -1.0, 2.0], [0.0] * 5]))
    values, indices = sae.encode_topk(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), 5)
    assert values.tolist() == [[2, 2, 2, 1, 0], [1, 0, 0, 0, 0], [0] * 5]
    assert indices.tolist() == [[1, 2, 4, 0, 0], [3, 0, 0, 0, 0], [0] * 5]
    assert sae.encode_topk(torch.tensor([1.0, 0.0]), 2).indices.tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(D_IN,), (7, D_IN), (2, 3, D_IN), (0, D_IN)], ids=str)
@pytest.mark.parametrize("ids", [[5], [39, 0, 17, 17, 3, 0], [], list(range(D_SAE))[::-1]], ids=len)
def test_encode_features(kind: str, shape: tuple[int, ...], ids: list[int]) -> None:
    sae, x = build(kind), torch.randn(*shape)
    expected = sae.encode(x)[..., torch.tensor(ids, dtype=torch.int64)]
    for given in (ids, torch.tensor(ids, dtype=torch.int32)):
        got = sae.encode_features(x, given)
        assert got.shape == (*shape[:-1], len(ids))
        assert got.dtype == sae.dtype
        torch.testing.assert_close(got, expected)
        assert torch.equal(got > 0, expected > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_encode(kind: str) -> None:
    sae, x, weights = build(kind), torch.randn(30, D_IN), torch.randn(30, 4)
    ids = torch.tensor([30, 2, 2, 11])
    parameters = [p for name, p in sae.named_parameters() if name != "threshold"]

    def gradients(picked: torch.Tensor) -> list[torch.Tensor]:
        loss = (picked * weights).sum()
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in grads]

    dense = sae.encode(x)
    for got, want in zip(gradients(sae.encode_features(x, ids)), gradients(dense[:, ids]), strict=True):
        torch.testing.assert_close(got, want)
    values, indices = sae.encode_topk(x, 4)
    expected = torch.where(values > 0, dense.gather(1, indices), 0)
    for got, want in zip(gradients(values), gradients(expected), strict=True):
        torch.testing.assert_close(got, want)


def padded(device: str) -> SparseActs:
    """Rows of capacity 3 with 2, 0 and 3 entries, as a GPU's encode leaves them."""
    return SparseActs(
        row_offsets=torch.tensor([0, 3, 6, 9], device=device),
        indices=torch.tensor([0, 7, 0, 0, 0, 0, 1, 4, 7], dtype=torch.int32, device=device),
        values=torch.tensor([1.0, 2, 0, 0, 0, 0, 5, 6, 5], device=device),
        shape=(3, 8),
        row_counts=torch.tensor([2, 0, 3], device=device),
    )


def test_padding_between_rows_counts_for_nothing() -> None:
    values, indices = top_activations(padded("cpu"), 3)
    assert values.tolist() == [[2, 1, 0], [0, 0, 0], [6, 5, 5]]
    assert indices.tolist() == [[7, 0, 0], [0, 0, 0], [4, 1, 7]]
    ids = torch.tensor([7, 0, 3, 7])
    assert columns(padded("cpu"), ids).tolist() == [[2, 1, 0, 2], [0] * 4, [5, 0, 0, 5]]
    two = SparseActs(**{**padded("cpu").__dict__, "row_counts": torch.tensor([2, 0, 2])})
    two.values[8], two.indices[8] = 0, 0  # capacity above k
    assert top_activations(two, 2).values.tolist() == [[2, 1], [0, 0], [6, 5]]


def test_picking_waits_for_no_device() -> None:
    # meta tensors hold no data, so nothing here can depend on any
    assert top_activations(padded("meta"), 3).values.shape == (3, 3)
    assert columns(padded("meta"), torch.zeros(4, dtype=torch.int64, device="meta")).shape == (3, 4)


def test_columns_of_a_per_feature_gate_cost_their_own_product_alone() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for kind in ("jumprelu", "relu", "batchtopk"):
        sae, x = build(kind), torch.randn(7, D_IN)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            sae.encode_features(x, [1, 2, 3])
        assert counter.get_total_flops() == 2 * 7 * D_IN * 3


@pytest.mark.parametrize("kind", KINDS)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_encode_features_in_a_whole_graph(kind: str) -> None:
    sae, x = build(kind), torch.randn(7, D_IN)
    compiled = torch.compile(sae.encode_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, torch.tensor([3, 3, 39])), sae.encode_features(x, [3, 3, 39]))
    with pytest.raises(RuntimeError, match="feature_ids: expected integers from 0 to d_sae - 1 = 39"):
        compiled(x, torch.tensor([3, -1, 39]))


def test_threshold_gets_its_estimate_from_picked_features() -> None:
    sae, x = build("jumprelu"), torch.randn(50, D_IN)
    sae.bandwidth = 0.5
    ids = [4, 9, 9]
    (got,) = torch.autograd.grad(sae.encode_features(x, ids).sum(), sae.threshold)
    (want,) = torch.autograd.grad(sae.encode(x)[:, ids].sum(), sae.threshold)
    assert want.abs().sum() > 0
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind: str) -> None:
    sae, x = build(kind).to(torch.bfloat16), torch.randn(9, D_IN)
    values, _ = sae.encode_topk(x, 2)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, sae.encode(x).float().topk(2).values, rtol=2e-2, atol=2e-2)
    got = sae.encode_features(x, [3, 1])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, sae.encode(x)[:, [3, 1]], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("k", "error", "got"),
    [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        (41, ValueError, "41"),
        (2.0, TypeError, "2.0"),
        (True, TypeError, "True"),
    ],
)
def test_bad_k(k: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=rf"^k: expected an integer from 1 to d_sae = 40, got {got}$"):
        build("topk").encode_topk(torch.randn(3, D_IN), k)


@pytest.mark.parametrize(
    ("ids", "error", "got"),
    [
        ([1, 40], ValueError, "40"),
        (torch.tensor([-1, 5]), ValueError, "-1"),
        ([1.0], TypeError, "torch.float32"),
        (torch.ones(40, dtype=torch.bool), TypeError, "torch.bool"),
        ([[1, 2]], ValueError, r"shape \(1, 2\)"),
        (3, ValueError, r"shape \(\)"),
        ("ab", TypeError, "'ab'"),
        (None, TypeError, "None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_bad_feature_ids(kind: str, ids: Any, error: type[Exception], got: str) -> None:
    expected = rf"^feature_ids: expected integers from 0 to d_sae - 1 = 39 in one dimension, got {got}$"
    with pytest.raises(error, match=expected):
        build(kind).encode_features(torch.randn(3, D_IN), ids)


@pytest.mark.parametrize("method", ["encode_topk", "encode_features"])
def test_bad_x(method: str) -> None:
    argument = 2 if method == "encode_topk" else [2]
    with pytest.raises(ValueError, match="x: expected last dimension d_in = 12"):
        getattr(build("relu"), method)(torch.randn(3, 11), argument)
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got list"):
        getattr(build("topk"), method)([0.0] * 12, argument)
