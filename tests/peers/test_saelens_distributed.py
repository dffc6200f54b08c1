"""DDP around an accelerated SAE of SAELens, in two processes: the weights that SAELens' own has after the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from saelens_problem import N_TOKENS, TrainStepInput, activations, training_sae
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastsae import accelerate

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
KINDS, STEPS, RANKS = ("jumprelu", "topk"), 4, 2


class Loss(nn.Module):
    """What DDP wraps: the loss of a training step as a forward pass."""

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor, step: int) -> Tensor:
        coefficients = {name: getattr(c, "value", c) for name, c in self.sae.get_coefficients().items()}
        dead = torch.arange(self.sae.cfg.d_sae) < 30
        step_input = TrainStepInput(x, coefficients, dead, n_training_steps=step, is_logging_step=False)
        return self.sae.training_forward_pass(step_input=step_input).loss


def trained(kind: str, model_of: Any, parts: slice) -> dict[str, Tensor]:
    sae = training_sae(kind, dtype="float64")
    handle = accelerate(sae) if model_of is DistributedDataParallel else None
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    model = model_of(Loss(sae))
    for step in range(STEPS):
        optimizer.zero_grad()
        model(activations(step).double()[parts], step).backward()
        optimizer.step()
    if handle is not None:
        assert handle.tally.fused == {"training_forward_pass": STEPS}
        assert not handle.tally.left
    return {name: p.detach().contiguous() for name, p in sae.named_parameters()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    half = N_TOKENS // RANKS
    mine = slice(rank * half, (rank + 1) * half)
    found = {kind: trained(kind, DistributedDataParallel, mine) for kind in KINDS}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_train_as_the_peer_alone(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for kind in KINDS:
        for name, want in trained(kind, lambda model: model, slice(None)).items():
            assert torch.equal(ranks[0][kind][name], ranks[1][kind][name]), f"{kind}: {name} differs between ranks"
            torch.testing.assert_close(ranks[0][kind][name], want, rtol=1e-7, atol=1e-8)
