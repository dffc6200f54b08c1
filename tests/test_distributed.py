"""DDP and FSDP2 in two processes: the weights that one process has on both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastsae import FusedJumpReLUSAE, FusedSAEAdam, UsageError

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
STEPS, RANKS = 3, 2
OPTIONS = {"lr": 1e-2, "normalize_decoder": True, "max_grad_norm": 0.5}


class Loss(nn.Module):
    """What DDP wraps: the training loss as a forward pass."""

    def __init__(self, sae: FusedJumpReLUSAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        return self.sae.training_forward(x).loss


def fresh() -> FusedJumpReLUSAE:
    torch.manual_seed(0)
    return FusedJumpReLUSAE(16, 64, init_threshold=2.0)


def batches(step: int) -> list[Tensor]:
    return [torch.randn(32, 16, generator=torch.Generator().manual_seed(10 * step + rank)) for rank in range(RANKS)]


def alone(*, projected: bool) -> dict[str, Tensor]:
    """One process, the mean over both batches."""
    sae = fresh()
    optimizer = FusedSAEAdam(sae, **OPTIONS) if projected else torch.optim.Adam(sae.parameters(), lr=1e-2)  # type: ignore[arg-type]
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([sae.training_forward(x).loss for x in batches(step)]).mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in sae.named_parameters()}


def with_ddp(rank: int, *, explicit: bool) -> dict[str, Tensor]:
    sae = fresh()
    optimizer = FusedSAEAdam(sae, **OPTIONS)  # type: ignore[arg-type]
    model = DistributedDataParallel(Loss(sae))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batches(step)[rank])
        if explicit:
            optimizer.backward(loss)
        else:
            loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in sae.named_parameters()}


def with_fsdp(rank: int) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    sae = fresh()
    fully_shard(sae)
    register_fsdp_forward_method(sae, "training_forward")
    with pytest.raises(UsageError, match="W_enc to be a plain parameter, got DTensor"):
        FusedSAEAdam(sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        sae.training_forward(batches(step)[rank]).loss.backward()
        optimizer.step()
    return {name: p.full_tensor() for name, p in sae.named_parameters()}  # type: ignore[attr-defined]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found = {
        "DDP": with_ddp(rank, explicit=False),
        "DDP, optimizer.backward": with_ddp(rank, explicit=True),
        "FSDP2": with_fsdp(rank),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for way, weights in ranks[0].items():
        for name, want in alone(projected=way != "FSDP2").items():
            assert torch.equal(weights[name], ranks[1][way][name]), f"{way}: {name} differs between ranks"
            torch.testing.assert_close(
                weights[name], want, rtol=1e-4, atol=1e-5, msg=lambda t, w=way, n=name: f"{w}: {n}: {t}"
            )
