"""The whole evaluation on a tiny model: special SAEs with known answers, padding, contexts, bad input."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import tqdm

from fastsae import FastsaeError, FusedJumpReLUSAE, UsageError
from fastsae.data import sinks
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import SinkRule
from fastsae.data.special_tokens import RoleHeader, SpecialTokens
from fastsae.evaluate import evaluate, reconstruction
from fastsae.evaluate.losses import LossSums, cross_entropies, token_losses

SPECIAL = SpecialTokens({"<|im_start|>": 3, "user": 4})
LENGTHS = [12, 7, 10, 1]
LOSSES = ["ce", "ce_spliced", "ce_zero", "delta_loss_percent", "recovered", "kl"]
MEANS = ["mse", "special_mse", "mse_with_sinks", "special_mse_with_sinks"]
ERRORS = [*MEANS, *(f"{name}_log2" for name in MEANS), "mse_micro", "special_mse_micro", "fvu", "special_fvu"]
OTHERS = ["explained_variance", "l0", "l0_special", "dead_share", "tokens", "dialogues"]
SINKS = ["fvu_sinks", "mse_sinks", "norm_sinks", "norm", "norm_median", "sinks", "sinks_beyond_position_0"]


@pytest.fixture(scope="module")
def residual(qwen2) -> ResidualStream:
    return ResidualStream(qwen2, 1)


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    ids = torch.randint(5, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 3
    ids[:, 4], ids[:, 6] = 4, 3
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    return TokenBatch.one_per_row(torch.where(mask, ids, 0), mask, torch.tensor([40, 41, 42, 43]))


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
    return evaluate(sae, residual, tokenizer, batches, special_tokens=SPECIAL, progress=False)


def test_identity(residual, tokenizer, batch):
    metrics = run(identity_sae(16), residual, tokenizer, [batch]).metrics
    assert {*LOSSES, *ERRORS, *OTHERS, *SINKS} <= set(metrics)
    assert metrics["tokens"] == sum(LENGTHS)
    assert metrics["dialogues"] == 4
    assert metrics["mse"] == metrics["special_mse"] == metrics["fvu"] == metrics["mse_sinks"] == 0
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
    rows = TokenBatch.one_per_row(batch.input_ids[:, :2], torch.ones(4, 2, dtype=torch.bool), batch.dialogue_ids[:, 0])
    metrics = run(constant_sae(16, 3.0), residual, tokenizer, [rows]).metrics  # all predictions come from position 0
    assert metrics["ce"] == metrics["ce_spliced"] == metrics["ce_zero"]
    assert metrics["recovered"] is None


@pytest.fixture
def with_sinks(tiny_model) -> tuple[ResidualStream, TokenBatch]:
    """A model whose token 9 is an attention sink wherever it stands, and dialogues that hold it twice, once and never."""
    model = copy.deepcopy(tiny_model("Qwen2"))

    def lengthen(_module, args, output):
        return torch.where((args[0] == 9)[..., None], 10_000 * output, output)

    model.get_input_embeddings().register_forward_hook(lengthen)
    ids = torch.randint(10, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = ids[0, 17] = ids[1, 9] = 9
    ids[1, 8], ids[2, 20] = 3, 4
    mask = torch.arange(40) < torch.tensor([[40], [30], [35]])
    return ResidualStream(model, 0), TokenBatch.one_per_row(ids, mask, torch.arange(3))


def test_sinks_beyond_position_0_are_found_and_left_out(with_sinks, tokenizer):
    residual, batch = with_sinks
    special = SpecialTokens({"<|im_start|>": 3}, {"user": (RoleHeader((3,), (9,)),)})
    found = evaluate(constant_sae(16, 0.5), residual, tokenizer, [batch], special_tokens=special, progress=False)
    x = residual(batch.input_ids, batch.attention_mask).double()
    is_sink = batch.input_ids == 9
    is_sink[:, 0] = True
    norms, late = x.norm(dim=-1), batch.attention_mask.clone()
    late[:, 0] = False
    assert norms[is_sink & late].min() > 10 * norms[late].median() > norms[late & ~is_sink].max()
    kept = late & ~is_sink
    error, metrics = (x - 0.5).square().mean(-1), found.metrics
    assert (metrics["sinks"], metrics["sinks_beyond_position_0"], metrics["tokens"]) == (6, 3, 105)
    assert metrics["norm_median"] == pytest.approx(norms[late].median().item(), rel=1e-6)
    assert metrics["mse"] == pytest.approx(sum(error[i][kept[i]].mean().item() for i in range(3)) / 3, rel=1e-6)
    assert metrics["mse_with_sinks"] > 10 * metrics["mse"]
    mean, special_x = x[kept].mean(0), x[1, 8]  # the only special token that is no sink
    assert metrics["fvu"] == pytest.approx((16 * error[kept].sum() / (x[kept] - mean).square().sum()).item(), rel=1e-6)
    assert metrics["special_mse"] == pytest.approx(error[1, 8].item(), rel=1e-6)
    assert metrics["special_fvu"] == pytest.approx(
        (16 * error[1, 8] / (special_x - mean).square().sum()).item(), rel=1e-6
    )
    assert [(row["token"], row["count"]) for row in found.special_tokens] == [
        ("<|im_start|>", 1),
        ("user", 0),  # the one behind <|im_start|> is a sink
        ("all other tokens", 98),
        ("attention sinks", 6),
    ]
    assert found.special_tokens[-1]["norm"] == pytest.approx(
        norms[is_sink & batch.attention_mask].mean().item(), rel=1e-6
    )


def test_sinks_keep_their_activation_in_the_spliced_pass(with_sinks, tokenizer):
    residual, batch = with_sinks
    inputs = batch.input_ids, batch.attention_mask
    x, logits = residual(*inputs), residual.logits(*inputs)
    is_sink = (batch.input_ids == 9) | (torch.arange(40) == 0)
    new = [residual.splice(*inputs, lambda h, v=value: torch.where(is_sink[..., None], x, v)) for value in (0.5, 0.0)]
    expected = LossSums()
    expected.add(token_losses(logits, new[0], cross_entropies(new[1], *inputs), *inputs))
    found = run(constant_sae(16, 0.5), residual, tokenizer, [batch]).metrics
    assert {name: found[name] for name in LOSSES} == pytest.approx(expected.metrics(), rel=1e-5)


def test_contexts_leave_sinks_out(with_sinks, tokenizer):
    residual, batch = with_sinks
    rows = run(identity_sae(16), residual, tokenizer, [batch]).top_special_features
    peaks = {(context["dialogue"], context["position"]) for row in rows for context in row["contexts"]}
    assert peaks
    assert not peaks & {(0, 0), (1, 0), (2, 0), (0, 5), (0, 17), (1, 9)}


def test_dialogues_of_sinks_alone_leave_the_figures_undefined(residual, tokenizer, batch):
    alone = batch[:, :1]
    found = run(identity_sae(16), residual, tokenizer, [alone])
    metrics = found.metrics
    assert (metrics["sinks"], metrics["tokens"], metrics["norm_median"]) == (4, 4, None)
    assert metrics["mse_with_sinks"] == metrics["special_mse_with_sinks"] == metrics["mse_sinks"] == 0
    for name in ("mse", "special_mse", "fvu", "special_fvu", "l0", "dead_share", "norm", *LOSSES):
        assert metrics[name] is None, name
    assert found.top_special_features == []
    json.dumps(metrics, allow_nan=False)


def test_the_median_does_not_depend_on_the_batches(residual, batch, monkeypatch):
    monkeypatch.setattr(sinks, "SAMPLE_TOKENS", 15)
    x = residual(batch.input_ids, batch.attention_mask)
    first = torch.cat([x[0, 1:12], x[1, 1:7]]).norm(dim=-1)  # 11 tokens, then 17 with the second dialogue
    rows = [batch[i : i + 1] for i in range(len(batch.input_ids))]
    longer = itertools.chain([batch], itertools.repeat(None))  # what comes later is not looked at
    for batches in ([batch], rows, longer):
        assert SinkRule.of_layers([residual], batches)[0].median_norm == pytest.approx(first.median().item(), rel=1e-6)


def test_the_rule_by_hand():
    x, positions = torch.tensor([[0.0], [0.0], [3.0], [-2.9]]), torch.tensor([0, 1, 2, 0])
    for median in (0.0, None):  # where most activations are zero, length says nothing
        assert SinkRule(median)(x, positions).tolist() == [True, False, False, True]
    assert SinkRule(0.29)(x, positions + 1).tolist() == [False, False, True, False]
    assert SinkRule(0.5)(x, positions).tolist() == [True, False, False, True]


def test_progress_counts_dialogues_and_can_be_silenced(residual, tokenizer, batch, capsys, monkeypatch):
    plain = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: plain(**{**options, "delay": 0}))
    sae = FusedJumpReLUSAE(16, 32, init_threshold=0.5)
    for progress in (True, False):
        evaluate(sae, residual, tokenizer, [batch], special_tokens=SPECIAL, n_dialogues=5, progress=progress)
        shown = capsys.readouterr().err
        assert bool(shown) is progress
        for text in (
            "evaluating",
            "0.00/5.00",
            "4.00/4.00",
            "reading contexts",
        ):  # one of the five was refused by the template
            assert (text in shown) is progress


def test_an_interrupt_is_not_swallowed(residual, tokenizer, batch):
    def interrupted():
        yield batch
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(FusedJumpReLUSAE(16, 32), residual, tokenizer, interrupted())


def test_groups_are_small_on_a_cpu_where_the_logits_are_expensive(residual, batch, monkeypatch):
    """PyTorch hears an interrupt between its operations, of which the logits are the longest."""
    flop_per_token = 2 * 16 * 61
    for flop, sizes in ((5e10, [4]), (24 * flop_per_token, [2, 2]), (1, [1, 1, 1, 1])):
        monkeypatch.setattr(reconstruction, "_HEAD_FLOP", flop)
        assert [len(group.input_ids) for group in reconstruction._row_groups(batch, residual)] == sizes


@pytest.mark.parametrize("limit", [4096, 20, 1])
def test_neither_batching_nor_padding_changes_a_number(residual, tokenizer, batch, monkeypatch, limit):
    sae = FusedJumpReLUSAE(16, 32, init_threshold=0.5)
    whole = run(sae, residual, tokenizer, [batch])
    rows = [batch[i : i + 1, :length] for i, length in enumerate(LENGTHS)]
    garbage = torch.where(batch.attention_mask, batch.input_ids, 17)
    monkeypatch.setattr(reconstruction, "_GROUP_TOKENS", limit)
    for other in ([replace(batch, input_ids=garbage)], rows):
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
    means = [[error[i, start:n].mean().item() for i, n in enumerate(LENGTHS) if n > start] for start in (0, 1)]
    assert metrics["mse_with_sinks"] == pytest.approx(sum(means[0]) / 4, rel=1e-6)
    assert metrics["mse"] == pytest.approx(sum(means[1]) / 3, rel=1e-6)  # the last dialogue is position 0 alone
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
    evaluation = evaluate(sae, residual, tokenizer, [batch], special_tokens=SpecialTokens(), progress=False)
    assert evaluation.metrics["special_mse"] is None
    assert [row["token"] for row in evaluation.special_tokens] == ["all other tokens", "attention sinks"]
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
    model = copy.deepcopy(tiny_model("Qwen2"))
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.inf
    with pytest.raises(FastsaeError, match="layer 1"):
        run(FusedJumpReLUSAE(16, 32), ResidualStream(model, 1), tokenizer, [batch])


def test_sums_of_dialogues_add_up_to_the_metrics(with_sinks, tokenizer):
    residual, batch = with_sinks
    result = run(constant_sae(16, 0.5), residual, tokenizer, [batch])
    sums, metrics = result.dialogues, result.metrics
    assert sums.dialogues.tolist() == sorted(batch.dialogue_ids[:, 0].tolist())

    def share(name, other, token_class="all"):
        return (sums.get(name, token_class).sum() / sums.get(other, token_class).sum()).item()

    expected = {
        "mse_micro": share("squared_error", "tokens") / sums.d_in,
        "fvu": share("squared_error", "variance"),
        "special_mse_micro": share("squared_error", "tokens", "special") / sums.d_in,
        "l0": share("l0", "tokens"),
        "fvu_sinks": share("squared_error", "variance", "sinks"),
        "ce": share("ce", "targets", "all_with_sinks"),
        "ce_zero": share("ce_zero", "targets", "all_with_sinks"),
        "kl": share("kl", "targets", "all_with_sinks"),
        "tokens": sums.get("tokens", "all_with_sinks").sum().item(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    macro = sums.get("squared_error", "all") / sums.get("tokens", "all") / sums.d_in
    assert metrics["mse"] == pytest.approx(macro.mean().item(), rel=1e-6)
