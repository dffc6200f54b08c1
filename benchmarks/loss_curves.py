"""Trains the same SAE on the same batches densely and fused, and draws both losses: `python -m benchmarks.loss_curves`.

Dense: `reference.autoencode`, autograd, `clip_grad_norm_`, `torch.optim.Adam` and an explicit projection and normalisation.
Fused: `training_forward` and `FusedSAEAdam`. Tokens are sums of four entries of a random dictionary and noise. In fp32 the
curves part by rounding, which decides on which side of its threshold a feature falls; in fp64 they show that nothing else
differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from benchmarks.steps import MAX_GRAD_NORM, Forward, Step, fused_step, plain_step
from fastsae import FusedJumpReLUSAE, FusedSAEAdam
from fastsae.train.initialize import initialize_from_data
from fastsae_kernels import AutoencodeSpec, reference

mpl.use("svg")
from matplotlib import pyplot as plt

mpl.rcParams["svg.hashsalt"] = "fastsae"  # the same file from the same numbers

STEPS, TOKENS, D_IN, D_SAE, TARGET_L0, LR = 300, 512, 128, 1024, 16.0, 1e-3


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g), dim=1)
    found = []
    for _ in range(STEPS):
        chosen = torch.rand(TOKENS, D_SAE, generator=g).topk(4, dim=1).indices
        acts = torch.zeros(TOKENS, D_SAE).scatter_(1, chosen, 0.5 + torch.rand(TOKENS, 4, generator=g))
        found.append(acts @ dictionary + 0.05 * torch.randn(TOKENS, D_IN, generator=g))
    return found


def dense(sae: FusedJumpReLUSAE, forward_of: Callable[[Forward], Forward]) -> Step:
    spec = AutoencodeSpec(bandwidth=sae.bandwidth)

    def forward(x: Tensor) -> Tensor:
        threshold = sae.threshold.clamp(min=0)
        sae_out, l0, _ = reference.autoencode(x, sae.W_enc, sae.b_enc, threshold, sae.W_dec, sae.b_dec, None, spec)
        return (sae_out - x).square().sum(1).mean() + 0.1 * 2 / TARGET_L0 * (l0 - TARGET_L0).square().mean()

    return plain_step(sae, forward_of(forward), torch.optim.Adam(sae.parameters(), lr=LR, fused=True), clipped=True)


def fused(sae: FusedJumpReLUSAE, forward_of: Callable[[Forward], Forward]) -> Step:
    optimizer = FusedSAEAdam(sae, lr=LR, max_grad_norm=MAX_GRAD_NORM, normalize_decoder=True)
    forward = forward_of(lambda x: sae.training_forward(x, 0.1, "quadratic", target_l0=TARGET_L0).loss)
    return fused_step(forward, optimizer)


def losses_of(make: Callable[..., Step], sae: FusedJumpReLUSAE, data: list[Tensor]) -> list[float]:
    losses = []

    def recorded(forward: Forward) -> Forward:
        def call(x: Tensor) -> Tensor:
            loss = forward(x)
            losses.append(loss.item())
            return loss

        return call

    step = make(sae, recorded)
    for x in data:
        step(x)
    return losses


def curves(sae: FusedJumpReLUSAE, data: list[Tensor]) -> dict[str, list[float]]:
    makers = {"dense, torch.optim.Adam": dense, "fused, FusedSAEAdam": fused}
    return {name: losses_of(make, copy.deepcopy(sae), data) for name, make in makers.items()}


def largest_difference(losses: dict[str, list[float]]) -> float:
    return max(abs(dense - fused) / abs(dense) for dense, fused in zip(*losses.values(), strict=True))


def main() -> None:
    data = batches()
    torch.manual_seed(0)
    sae = FusedJumpReLUSAE(D_IN, D_SAE, bandwidth=0.1, init_threshold=0.1)
    initialize_from_data(sae, data[0], "mean", init_l0=100)
    found = curves(sae, data)
    exact = curves(copy.deepcopy(sae).double(), [x.double() for x in data])
    differences = f"{largest_difference(found):.1e} in fp32, {largest_difference(exact):.1e} in fp64"
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, losses), style in zip(found.items(), [{"color": "#94a3b8", "lw": 5}, {"color": "#0f766e"}], strict=True):
        axis.plot(losses, label=f"{name}, fp32", **style)
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axis.set_title(f"same weights, same batches; largest relative difference {differences}", fontsize=9)
    axis.legend()
    path = Path(__file__).parent / "plots" / "loss_curves.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"{path.name}: largest relative difference {differences}")


if __name__ == "__main__":
    main()
