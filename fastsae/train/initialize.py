"""What an SAE takes before its first step: scale, b_dec and b_enc from the data, or the weights of another SAE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.sae import FusedJumpReLUSAE, SparseAutoencoder

SAMPLE = 16_384  # tokens that the estimates look at
# of a feature: so many tell the share of the tokens that it fires on to a tenth, and b_enc needs no more tokens than that
FIRINGS = 128


def activation_scale(acts: Tensor) -> float:
    """The factor that gives activations `[N, d_in]` a mean norm of `sqrt(d_in)`: `sqrt(d_in) / mean |x|`.

    Raises:
        FastsaeError: The mean norm is more than float32 can hold.
    """
    mean_norm = acts.float().norm(dim=1).mean().item()
    if not math.isfinite(mean_norm):
        raise FastsaeError(
            f"the activations of this layer are too large to train on: single ones are {acts.abs().max().item():.1e}, so "
            "that their norm overflows float32. Choose an earlier --layer, or get the model's files again"
        )
    return acts.shape[1] ** 0.5 / max(mean_norm, 1e-12)


def geometric_median(points: Tensor, max_steps: int = 100, tolerance: float = 1e-7) -> Tensor:
    """The point with the least sum of distances to `points` `[N, d]`, by Weiszfeld's iteration, in fp32.

        w_i = 1 / max(|p_i - m|, 1e-6) ;  m' = sum w_i p_i / sum w_i

    Stops where the sum of distances changes by less than `tolerance` of itself.

    Source:
        arXiv:2506.07691, appendix A.
    """
    points = points.float()
    median = points.mean(0)
    last = float("inf")
    for _ in range(max_steps):
        distances = (points - median).norm(dim=1)
        total = distances.sum().item()
        if abs(last - total) <= tolerance * total:
            break
        last = total
        weights = 1 / distances.clamp_min(1e-6)
        median = (weights[:, None] * points).sum(0) / weights.sum()
    return median


@torch.no_grad()
def initialize_from_data(sae: SparseAutoencoder, acts: Tensor, b_dec_init: str, init_l0: float | None) -> None:
    """Sets `b_dec` to the data's centre and `b_enc` so that about `init_l0` features fire on a token.

        b_enc_j = threshold_j - quantile_{1 - init_l0 / d_sae}(x @ W_enc_j)

    With the usual zero bias half of all features fire at first: a slow, dense phase whose only work is to become sparse.

    Args:
        sae: Fresh.
        acts: `[N, d_in]`, as the SAE will see them (scaled).
        b_dec_init: `geometric_median`, `mean` or `zero`.
        init_l0: Features per token to begin with; None leaves `b_enc` at 0.

    Source:
        The quantile rule: Anthropic, "Circuits Updates - January 2025".
    """
    acts = acts[:SAMPLE].to(sae.device, torch.float32)
    if b_dec_init != "zero":
        sae.b_dec.copy_(geometric_median(acts) if b_dec_init == "geometric_median" else acts.mean(0))
    if init_l0 is None or init_l0 >= sae.d_sae:
        return
    acts = acts[: math.ceil(FIRINGS * sae.d_sae / init_l0)]
    sae_in = acts - sae.b_dec.float() if sae.apply_b_dec_to_input else acts
    # the gate is strict, so the element whose value becomes the threshold is the first that does not fire
    rank = min(acts.shape[0], max(1, round(acts.shape[0] * init_l0 / sae.d_sae)) + 1)
    threshold = sae.threshold if isinstance(sae, FusedJumpReLUSAE) else torch.zeros_like(sae.b_enc)
    for ids in torch.arange(sae.d_shard, device=sae.device).split(1024):
        hidden_pre = sae.W_enc[:, ids].float().t() @ sae_in.t()  # [1024, N]
        largest = hidden_pre.topk(rank, dim=1, sorted=False).values
        sae.b_enc[ids] = (threshold[ids] - largest.amin(1)).to(sae.dtype)


@torch.no_grad()
def start_from(sae: SparseAutoencoder, source: SparseAutoencoder, scale: float) -> None:
    """Gives the fresh SAE of a run the weights of `source`, which is used up; of several processes, this one's part of them.

    Args:
        sae: What the run trains, on activations that are multiplied by `scale`.
        source: Of the same class, on activations as they are.
        scale: The run's.
    """
    source.fold_activation_scale_(1 / scale)
    state = source.state_dict()
    for name in ("threshold", "log_threshold"):
        state.pop(name, None)
    if isinstance(source, FusedJumpReLUSAE):
        threshold = source.threshold.detach()
        if "log_threshold" in sae.state_dict():
            smallest = torch.finfo(threshold.dtype).tiny  # the logarithm of 0 could never rise
            state["log_threshold"] = threshold.clamp(min=smallest).log()
        else:
            state["threshold"] = threshold
    if sae.sharding is not None:
        state = {name: sae.sharding.own_part(name, tensor) for name, tensor in state.items()}
    sae.load_state_dict(state)
