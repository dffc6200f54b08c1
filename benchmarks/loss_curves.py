"""Trains the same SAE on the same batches densely and fused, and draws both losses: `python -m benchmarks.loss_curves`.

Dense: `reference.autoencode`, autograd, `clip_grad_norm_`, `torch.optim.Adam` and an explicit projection and normalisation.
Fused: `training_forward` and `FusedSAEAdam`. Tokens are sums of four entries of a random dictionary and noise. In fp32 the
curves part by rounding, which decides on which side of its threshold a feature falls; in fp64 they show that nothing else
differs.
"""

from __future__ import annotations

import copy
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from benchmarks.steps import MAX_GRAD_NORM, fused_step, plain_step
from fastsae import FusedJumpReLUSAE, FusedSAEAdam
from fastsae.train.initialize import initialize_from_data
from fastsae_kernels import AutoencodeSpec, reference

mpl.use("svg")
from matplotlib import pyplot as plt

mpl.rcParams["svg.hashsalt"] = "fastsae"  # the same file from the same numbers
STEPS, TOKENS, D_IN, D_SAE, TARGET_L0, LR = 300, 512, 128, 1024, 16.0, 1e-3
STYLES = {"dense, torch.optim.Adam": {"color": "#94a3b8", "lw": 5}, "fused, FusedSAEAdam": {"color": "#0f766e"}}


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g), dim=1)
    found = []
    for _ in range(STEPS):
        chosen = torch.rand(TOKENS, D_SAE, generator=g).topk(4, dim=1).indices
        acts = torch.zeros(TOKENS, D_SAE).scatter_(1, chosen, 0.5 + torch.rand(TOKENS, 4, generator=g))
        found.append(acts @ dictionary + 0.05 * torch.randn(TOKENS, D_IN, generator=g))
    return found


def curve(sae: FusedJumpReLUSAE, data: list[Tensor], is_dense: bool) -> list[float]:
    """The loss of each step."""
    losses = []

    def forward(x: Tensor) -> Tensor:
        if is_dense:
            weights = (sae.W_enc, sae.b_enc, sae.threshold.clamp(min=0), sae.W_dec, sae.b_dec)
            sae_out, l0, _ = reference.autoencode(x, *weights, None, AutoencodeSpec(bandwidth=sae.bandwidth))
            penalty = 0.1 * 2 / TARGET_L0 * (l0 - TARGET_L0).square().mean()
            loss = (sae_out - x).square().sum(1).mean() + penalty
        else:
            loss = sae.training_forward(x, 0.1, "quadratic", target_l0=TARGET_L0).loss
        losses.append(loss.item())
        return loss

    if is_dense:
        step = plain_step(sae, forward, torch.optim.Adam(sae.parameters(), lr=LR, fused=True), clipped=True)
    else:
        step = fused_step(forward, FusedSAEAdam(sae, lr=LR, max_grad_norm=MAX_GRAD_NORM, normalize_decoder=True))
    for x in data:
        step(x)
    return losses


def main() -> None:
    data, differences, figure = batches(), [], plt.figure(figsize=(7, 4), layout="constrained")
    torch.manual_seed(0)
    sae, axis = FusedJumpReLUSAE(D_IN, D_SAE, bandwidth=0.1, init_threshold=0.1), figure.subplots()
    initialize_from_data(sae, data[0], "mean", init_l0=100)
    for name, dtype in {"fp32": torch.float32, "fp64": torch.float64}.items():
        wide = [x.to(dtype) for x in data]
        found = [curve(copy.deepcopy(sae).to(dtype), wide, is_dense) for is_dense in (True, False)]
        difference = max(abs(dense - fused) / abs(dense) for dense, fused in zip(*found, strict=True))
        differences.append(f"{difference:.1e} in {name}")
        for label, losses in zip(STYLES, found, strict=True):
            if name == "fp32":
                axis.plot(losses, label=f"{label}, fp32", **STYLES[label])
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axis.set_title(f"same weights, same batches; largest relative difference {', '.join(differences)}", fontsize=9)
    axis.legend()
    path = Path(__file__).parent / "plots" / "loss_curves.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"{path.name}: largest relative difference {', '.join(differences)}")


if __name__ == "__main__":
    main()
