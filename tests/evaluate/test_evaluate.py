"""The whole evaluation on a tiny model: special SAEs with known answers, padding, contexts, bad input."""

import json
import math

import pytest
import torch

from fastsae import FastsaeError, FusedJumpReLUSAE, UsageError
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch
from fastsae.evaluate import evaluate, reconstruction

SPECIAL = {"<|im_start|>": 3, "user": 4}
LENGTHS = [12, 7, 10, 1]
LOSSES = ["ce", "ce_spliced", "ce_zero", "delta_loss_percent", "recovered", "kl"]
ERRORS = [
    "mse",
    "mse_log2",
    "special_mse",
    "special_mse_log2",
    "mse_micro",
    "special_mse_micro",
    "mse_without_position_0",
]
OTHERS = ["fvu", "explained_variance", "l0", "l0_special", "dead_share", "tokens"]
POSITION_0 = ["fvu_position_0", "mse_position_0", "norm_position_0"]


@pytest.fixture(scope="module")
def residual(qwen2) -> ResidualStream:
    return ResidualStream(qwen2, 1)


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    ids = torch.randint(5, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 3
    ids[:, 4], ids[:, 6] = 4, 3
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    return TokenBatch(torch.where(mask, ids, 0), mask, torch.tensor([40, 41, 42, 43]))


def identity_sae(d_in: int) -> FusedJumpReLUSAE:
    """Two features per dimension, one for each sign: reconstructs everything."""
    sae = FusedJumpReLUSAE(d_in, 2 * d_in, init_threshold=0.0)
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    with torch.no_grad():
        sae.W_enc.copy_(both.t())
        sae.W_dec.copy_(both)
    return sae


def constant_sae(d_in: int, value: torch.Tensor | float) -> FusedJumpReLUSAE:
    """No feature ever fires, the reconstruction is `value`."""
    sae = FusedJumpReLUSAE(d_in, 8)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
        sae.b_dec.copy_(torch.as_tensor(value))
    return sae


def run(sae, residual, tokenizer, batches):
    return evaluate(sae, residual, tokenizer, batches, special_ids=SPECIAL, progress=False)


def test_identity(residual, tokenizer, batch):
    metrics = run(identity_sae(16), residual, tokenizer, [batch]).metrics
    assert {*LOSSES, *ERRORS, *OTHERS, *POSITION_0} <= set(metrics)
    assert metrics["tokens"] == sum(LENGTHS)
    assert metrics["dialogues"] == 4
    assert metrics["mse"] == metrics["special_mse"] == metrics["fvu"] == metrics["mse_position_0"] == 0
    assert metrics["l0"] == 16
    assert metrics["delta_loss_percent"] == metrics["kl"] == 0
    assert metrics["recovered"] == 1
    assert metrics["ce"] == metrics["ce_spliced"] != metrics["ce_zero"]
    json.dumps(metrics, allow_nan=False)


def test_zeros_recover_nothing(residual, tokenizer, batch):
    evaluation = run(constant_sae(16, 0.0), residual, tokenizer, [batch])
    metrics = evaluation.metrics
    assert metrics["ce_spliced"] == metrics["ce_zero"]
    assert metrics["recovered"] == 0
    assert metrics["kl"] > 0
    assert (metrics["l0"], metrics["dead_share"]) == (0, 1)
    assert evaluation.top_special_features == []


def test_the_mean_has_fvu_one(residual, tokenizer, batch):
    x = residual(batch.input_ids, batch.attention_mask)
    late = batch.attention_mask & (torch.arange(12) > 0)
    metrics = run(constant_sae(16, x[late].mean(0)), residual, tokenizer, [batch]).metrics
    assert metrics["fvu"] == pytest.approx(1, abs=1e-6)


def test_position_0_keeps_its_activation_in_the_spliced_pass(residual, tokenizer, batch):
    rows = TokenBatch(batch.input_ids[:, :2], torch.ones(4, 2, dtype=torch.bool), batch.dialogue_ids)
    metrics = run(constant_sae(16, 3.0), residual, tokenizer, [rows]).metrics  # all predictions come from position 0
    assert metrics["ce"] == metrics["ce_spliced"] == metrics["ce_zero"]
    assert metrics["recovered"] is None


@pytest.mark.parametrize("limit", [4096, 20, 1])
def test_neither_batching_nor_padding_changes_a_number(residual, tokenizer, batch, monkeypatch, limit):
    sae = FusedJumpReLUSAE(16, 32, init_threshold=0.5)
    whole = run(sae, residual, tokenizer, [batch])
    rows = []
    for i, length in enumerate(LENGTHS):
        part = slice(i, i + 1)
        rows.append(TokenBatch(batch.input_ids[part, :length], batch.attention_mask[part, :length], torch.tensor([i])))
    garbage = torch.where(batch.attention_mask, batch.input_ids, 17)
    monkeypatch.setattr(reconstruction, "_GROUP_TOKENS", limit)
    for other in ([TokenBatch(garbage, batch.attention_mask, batch.dialogue_ids)], rows):
        found = run(sae, residual, tokenizer, other)
        assert found.metrics == pytest.approx(whole.metrics, rel=1e-4)
        assert torch.equal(found.feature_counts, whole.feature_counts)


def test_metrics_equal_a_dense_computation(residual, tokenizer, batch):
    sae = FusedJumpReLUSAE(16, 32, init_threshold=0.5, apply_b_dec_to_input=True)
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(0))
    evaluation = run(sae, residual, tokenizer, [batch])
    metrics = evaluation.metrics
    x, mask = residual(batch.input_ids, batch.attention_mask), batch.attention_mask
    with torch.no_grad():
        acts, sae_out = sae.encode(x), sae(x)
    error = (x - sae_out).double().square().mean(-1)
    assert metrics["mse"] == pytest.approx(sum(error[i, :n].mean().item() for i, n in enumerate(LENGTHS)) / 4, rel=1e-6)
    assert metrics["mse_log2"] == pytest.approx(math.log2(metrics["mse"]))
    late = mask & (torch.arange(12) > 0)
    assert metrics["fvu"] == pytest.approx(
        (error[late].sum() * 16 / (x[late] - x[late].mean(0)).square().sum()).item(), rel=1e-5
    )
    fires = acts[late] > 0
    assert metrics["l0"] == pytest.approx(fires.sum(1).double().mean().item())
    assert torch.equal(evaluation.feature_counts, fires.sum(0))
    assert metrics["dead_share"] == pytest.approx((fires.sum(0) == 0).double().mean().item())
    special = late & torch.isin(batch.input_ids, torch.tensor([3, 4]))
    strength = acts[special].mean(0)
    first = evaluation.top_special_features[0]
    assert first["feature"] == strength.argmax()
    assert first["mean_activation"] == pytest.approx(strength.max().item(), rel=1e-5)
    assert first["share_special"] == pytest.approx((acts[special][:, first["feature"]] > 0).double().mean().item())
    assert first["share_other"] == pytest.approx(
        (acts[late & ~special][:, first["feature"]] > 0).double().mean().item()
    )
    user = late & (batch.input_ids == 4)
    assert first["mean_activation_by_token"]["user"] == pytest.approx(acts[user][:, first["feature"]].mean().item())
    assert len(evaluation.top_special_features) == min(10, int((strength > 0).sum()))


def test_contexts_are_the_dialogues_with_the_largest_activations(residual, tokenizer, batch):
    sae = FusedJumpReLUSAE(16, 32, init_threshold=0.5)
    rows = run(sae, residual, tokenizer, [batch]).top_special_features
    with torch.no_grad():
        acts = sae.encode(residual(batch.input_ids, batch.attention_mask))
    acts = acts * (batch.attention_mask & (torch.arange(12) > 0))[..., None]  # position 0 is no peak
    for row in rows:
        largest, where = acts[:, :, row["feature"]].max(1)
        order = [i for i in largest.argsort(descending=True).tolist() if largest[i] > 0]
        assert [context["dialogue"] for context in row["contexts"]] == [40 + i for i in order]
        for i, context in zip(order, row["contexts"], strict=True):
            assert context["max_activation"] == pytest.approx(largest[i].item(), rel=1e-4)
            assert context["position"] == context["peak"] == where[i]  # these dialogues fit into the window
            assert context["tokens"] == [f"t{j} " for j in batch.input_ids[i, : LENGTHS[i]][: where[i] + 13].tolist()]
            assert context["activations"][context["peak"]] == context["max_activation"]


def test_no_special_tokens(residual, tokenizer, batch):
    sae = FusedJumpReLUSAE(16, 32)
    evaluation = evaluate(sae, residual, tokenizer, [batch], special_ids={}, progress=False)
    assert evaluation.metrics["special_mse"] is None
    assert [row["token"] for row in evaluation.special_tokens] == ["all other tokens", "position 0"]
    assert evaluation.top_special_features == []


def test_bad_input(residual, tokenizer, batch):
    with pytest.raises(UsageError, match="width 8, but layer 1 of the model gives 16"):
        run(FusedJumpReLUSAE(8, 16), residual, tokenizer, [batch])
    with pytest.raises(UsageError, match="no dialogues"):
        run(FusedJumpReLUSAE(16, 32), residual, tokenizer, [])
    for damage in ("W_dec", "W_enc"):
        sae = identity_sae(16)
        with torch.no_grad():
            getattr(sae, damage).fill_(torch.nan)
        with pytest.raises(FastsaeError, match="damaged"):
            run(sae, residual, tokenizer, [batch])


def test_activations_that_are_not_finite_name_the_layer(tiny_model, tokenizer, batch):
    import copy

    model = copy.deepcopy(tiny_model("Qwen2"))
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.inf
    with pytest.raises(FastsaeError, match="layer 1"):
        run(FusedJumpReLUSAE(16, 32), ResidualStream(model, 1), tokenizer, [batch])
