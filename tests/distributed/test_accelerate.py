"""SAEs of SAELens whose features two processes share, against SAELens' own that one process holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from saelens_problem import D_SAE, TRAINED, TrainStepInput, activations, training_sae
from torch import Tensor, distributed

import fastsae

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
KINDS = list(TRAINED)
DEAD = {"few": 30, "many": D_SAE // 2 + 20}  # more than AuxK takes, in both processes


def step_input(sae: Any, dead: int) -> TrainStepInput:
    coefficients = {name: getattr(c, "value", c) for name, c in sae.get_coefficients().items()}
    mask = torch.arange(D_SAE) < dead
    return TrainStepInput(activations(3).double(), coefficients, mask, n_training_steps=1, is_logging_step=False)


def trained(sae: Any, dead: int) -> dict[str, Tensor]:
    """Loss terms, counts and every gradient of one training step."""
    output = sae.training_forward_pass(step_input(sae, dead))
    output.loss.backward()
    counts = getattr(output, "feature_counts", None)
    found = {"loss": output.loss, **output.losses, "sae_out": output.sae_out}
    found["counts"] = (output.feature_acts > 0).sum(0) if counts is None else counts
    if hasattr(sae, "topk_threshold"):
        found["topk_threshold"] = sae.topk_threshold
    found |= {f"grad {name}": p.grad for name, p in sae.named_parameters()}
    return {name: value.detach().clone() for name, value in found.items()}


def shared_steps(kinds: list[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for kind in kinds:
        for amount, dead in DEAD.items():
            sae = training_sae(kind, dtype="float64")
            with fastsae.accelerate(sae, mesh=distributed.group.WORLD):
                sharding = sae.sharding
                got = trained(sae, dead)
            of_weights = {
                f"grad {name}": sharding.whole(name, got[f"grad {name}"]) for name in dict(sae.named_parameters())
            }
            found[f"{kind}, {amount}"] = got | of_weights
    return found


@pytest.mark.parametrize("n_processes", [2, 3])
def test_a_step_is_that_of_the_whole_sae(n_processes: int, tmp_path: Path) -> None:
    ranks = run(shared_steps, n_processes, tmp_path, KINDS)
    for kind in KINDS:
        for amount, dead in DEAD.items():
            want = trained(training_sae(kind, dtype="float64"), dead)
            for rank in ranks:
                got = rank[f"{kind}, {amount}"]
                assert got.keys() == want.keys()
                for name, value in want.items():
                    rtol, atol = (
                        (1e-9, 1e-11) if value.dtype == torch.float64 else (1e-5, 1e-6)
                    )  # a threshold's gradient
                    text = f"{kind}, {amount}: {name}"
                    torch.testing.assert_close(
                        got[name], value, rtol=rtol, atol=atol, msg=lambda t, text=text: f"{text}: {t}"
                    )
