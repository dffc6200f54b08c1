"""Gradient signal-to-noise ratios: against autograd token by token, and on gradients whose ratio is known."""

from __future__ import annotations

import json

import pytest
import torch
from gradient_problem import D_IN, D_SAE, KINDS, N, dense_gradients, make, tokens

from fastsae import FusedJumpReLUSAE, UsageError
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import BlockSequencer, FastSequencer, PackedSequencer
from fastsae.evaluate import gsnr as module
from fastsae.evaluate.gsnr import GradientMoments, Moments, gsnr
from fastsae.sae.token_gradients import SparsityTerm, token_gradients


def plain_summary(draws: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The ratio of each parameter and the pooled one, from the draws themselves."""
    n, mean, variance = len(draws), draws.mean(0), draws.var(0)
    ratios = (mean.square() - variance / n) / variance
    is_noisy = variance > 1e-12 * draws.square().mean(0)
    pooled = (mean.square() - variance / n)[is_noisy].sum() / variance[is_noisy].sum()
    return ratios.masked_fill(~is_noisy, torch.nan), float(pooled)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "batchtopk"])
def test_ratios_over_tokens_and_dialogues(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 7 * D_IN)  # several blocks of features
    sae, term = make(kind)
    x, dialogues = tokens(), torch.tensor([0] * 3 + [1] * 7 + [2] * 1 + [5] * 9 + [4] * 10)
    moments = GradientMoments(sae, term, n_sampled=D_SAE)
    for part in (slice(0, 10), slice(10, 11), slice(11, 11), slice(11, 30)):
        moments.add(x[part], dialogues[part])
    expected = dense_gradients(sae, x, term)
    result = moments.result()
    fires = torch.zeros(D_SAE, dtype=torch.bool)
    gradients = token_gradients(sae, x, term)
    fires[gradients.features[gradients.acts > 0]] = True
    assert not fires[-1]
    assert (result["tokens"], result["dialogues"], result["live_features"]) == (N, 5, int(fires.sum()))
    for name, of_tokens in expected.items():
        of_dialogues = torch.stack([of_tokens[dialogues == d].mean(0) for d in (0, 1, 2, 4, 5)])
        for sums, draws in ((moments.of_tokens[name], of_tokens), (moments.of_dialogues[name], of_dialogues)):
            ratios, pooled = plain_summary(draws)
            found, _ = sums.ratios(len(draws))
            torch.testing.assert_close(found, ratios, rtol=1e-6, atol=1e-9, equal_nan=True)
            summary = result["per_token" if draws is of_tokens else "per_dialogue"][name]
            assert summary["pooled"] == pytest.approx(pooled, rel=1e-6)
            groups = {"all": ...} if name == "b_dec" else {"live": fires, "dead": ~fires}
            for group, chosen in groups.items():
                values = ratios[chosen]
                values = values[~values.isnan()]
                assert summary[group]["parameters"] == ratios[chosen].numel()
                assert summary[group]["with_variance"] == values.numel()
                if values.numel():
                    quartiles = values.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).clamp(min=0).tolist()
                    names = ("lower_quartile", "median", "upper_quartile")
                    assert [summary[group][q] for q in names] == pytest.approx(quartiles, rel=1e-6, abs=1e-12)
                    assert summary[group]["mean"] == pytest.approx(values.mean().item(), rel=1e-6)
                else:
                    assert summary[group]["median"] is None
    json.dumps(result, allow_nan=False)


def test_batch_topk_keeps_the_choice_of_its_batch() -> None:
    sae, term = make("batchtopk")
    moments = GradientMoments(sae, term)
    moments.add(tokens(), torch.zeros(N, dtype=torch.int64))
    ratios, _ = plain_summary(dense_gradients(sae, tokens(), term)["W_dec"])
    torch.testing.assert_close(moments.of_tokens["W_dec"].ratios(N)[0], ratios, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("kind", ["step", "relu"])
def test_an_sae_that_never_fires_has_no_ratio_but_that_of_its_bias(kind: str) -> None:
    sae, term = make(kind)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    moments = GradientMoments(sae, term)
    moments.add(tokens(), torch.arange(N) // 6)
    result = moments.result()
    assert result["live_features"] == 0
    for unit in ("per_token", "per_dialogue"):
        assert result[unit]["W_dec"]["pooled"] is None
        assert result[unit]["b_dec"]["pooled"] is not None


def test_a_sample_of_features_is_that_of_all() -> None:
    sae, term = make("step")
    dialogues = torch.arange(N) // 6
    few, every = GradientMoments(sae, term, n_sampled=9, seed=3), GradientMoments(sae, term, n_sampled=D_SAE)
    few.add(tokens(), dialogues)
    every.add(tokens(), dialogues)
    assert len(few.sampled) == 9
    for name in ("W_enc", "W_dec"):
        torch.testing.assert_close(few.of_dialogues[name].first, every.of_dialogues[name].first[few.sampled])
        torch.testing.assert_close(few.of_dialogues[name].second, every.of_dialogues[name].second[few.sampled])


@pytest.mark.parametrize("n", [8, 64])
def test_noise_has_a_ratio_of_zero_and_a_signal_its_own(n: int) -> None:
    shape, generator = (100, 100), torch.Generator().manual_seed(0)
    noise, signal = Moments(shape), Moments(shape)
    for _ in range(n):
        draw = torch.randn(1, *shape, generator=generator).double()
        noise.add_draws(draw)
        signal.add_draws(2 * draw + 3)
    found = noise.summary(n)
    # the standard error of the mean of 10,000 ratios is about 0.014 / n; the plain estimate would be 1 / n
    assert found["all"]["median"] == 0
    assert abs(found["all"]["mean"]) < 0.1 / n + 3 / n**2
    assert abs(found["pooled"]) < 0.05 / n
    found = signal.summary(n)
    assert found["pooled"] == pytest.approx(9 / 4, rel=0.02)
    if n == 64:
        assert found["all"]["mean"] == pytest.approx(9 / 4, rel=0.05)
        assert found["all"]["lower_quartile"] < found["all"]["median"] < found["all"]["upper_quartile"]


def test_a_constant_gradient_has_no_variance() -> None:
    moments = Moments((3,))
    moments.add_draws(torch.full((7, 3), 0.1).double())
    assert moments.summary(7) == {
        "pooled": None,
        "all": {"parameters": 3, "with_variance": 0, "mean": None}
        | dict.fromkeys(("lower_quartile", "median", "upper_quartile")),
    }


def test_the_scale_of_loss_and_parameters_does_not_show() -> None:
    sae, term = make("step")
    small = GradientMoments(sae, term)
    small.add(tokens(), torch.zeros(N, dtype=torch.int64))
    sae.fold_activation_scale_(0.25)  # the SAE of activations four times as large
    large = GradientMoments(sae, SparsityTerm(16 * term.coefficient))
    large.add(4 * tokens(), torch.zeros(N, dtype=torch.int64))
    for name, of_small in small.of_tokens.items():
        torch.testing.assert_close(large.of_tokens[name].ratios(N)[0], of_small.ratios(N)[0], equal_nan=True)


class TokenIds:
    pad_token_id, bos_token = 0, None


@pytest.mark.parametrize("sequencer", [FastSequencer, PackedSequencer, BlockSequencer])
def test_measured_on_a_model(qwen2, sequencer) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in (9, 14, 5, 21, 30, 12)]
    options = {"block_length": 16} if sequencer is BlockSequencer else {}
    batches = sequencer(data, range(6), TokenIds(), batch_tokens=48, shuffle=False, endless=False, **options)
    sae, residual = FusedJumpReLUSAE(16, 32), ResidualStream(qwen2, 1)
    result = gsnr(sae, residual, batches, SparsityTerm(0.1), progress=False)
    n_first = 5 if sequencer is BlockSequencer else 6  # 91 tokens fill 5 blocks of 16
    n_all = 80 if sequencer is BlockSequencer else 91
    assert result["tokens"] == n_all - n_first
    assert result["dialogues"] >= 6 or sequencer is BlockSequencer
    assert result["per_token"]["W_dec"]["pooled"] is not None
    json.dumps(result, allow_nan=False)
    again = sequencer(data, range(6), TokenIds(), batch_tokens=48, shuffle=False, endless=False, **options)
    assert gsnr(sae, residual, again, SparsityTerm(0.1), progress=False) == result


def test_bad_input(qwen2) -> None:
    residual = ResidualStream(qwen2, 1)
    batches = FastSequencer([[5, 6]], [0], TokenIds(), shuffle=False, endless=False)
    with pytest.raises(UsageError, match="two tokens at least, got 1"):
        gsnr(FusedJumpReLUSAE(16, 32), residual, batches, SparsityTerm(), progress=False)
    with pytest.raises(UsageError, match="width 16, got one of width 8"):
        gsnr(FusedJumpReLUSAE(8, 32), residual, [], SparsityTerm(), progress=False)
