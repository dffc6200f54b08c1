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


def train_dense(sae: FusedJumpReLUSAE, data: list[Tensor]) -> list[float]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    spec, losses = AutoencodeSpec(bandwidth=sae.bandwidth), []
    for x in data:
        threshold = sae.threshold.clamp(min=0)
        sae_out, l0, _ = reference.autoencode(x, sae.W_enc, sae.b_enc, threshold, sae.W_dec, sae.b_dec, None, spec)
        loss = (sae_out - x).square().sum(1).mean() + 0.1 * 2 / TARGET_L0 * (l0 - TARGET_L0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert sae.W_dec.grad is not None
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            sae.normalize_decoder_()
        losses.append(loss.item())
    return losses


def train_fused(sae: FusedJumpReLUSAE, data: list[Tensor]) -> list[float]:
    optimizer = FusedSAEAdam(sae, lr=LR, max_grad_norm=1.0, normalize_decoder=True)
    losses = []
    for x in data:
        loss = sae.training_forward(x, 0.1, "quadratic", target_l0=TARGET_L0).loss
        optimizer.zero_grad()
        optimizer.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def curves(sae: FusedJumpReLUSAE, data: list[Tensor]) -> dict[str, list[float]]:
    trainers: dict[str, Callable[[FusedJumpReLUSAE, list[Tensor]], list[float]]] = {
        "dense, torch.optim.Adam": train_dense,
        "fused, FusedSAEAdam": train_fused,
    }
    return {name: train(copy.deepcopy(sae), data) for name, train in trainers.items()}


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
