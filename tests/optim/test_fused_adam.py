"""`FusedSAEAdam` against autograd, `torch.optim.Adam`, an explicit projection, clipping and normalisation."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_helpers import DEVICE, FEW_PROGRAMS, needs_kernels
from torch import Tensor

import fastsae_kernels as kernels
from fastsae import (
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedSAEAdam,
    FusedTopKSAE,
    SparseAutoencoder,
    UsageError,
)
from fastsae_kernels.backend import BackendName as Backend
from fastsae_kernels.types import Capacity

D_IN, D_SAE, N = 12, 40, 64


def make(kind: str = "jumprelu", dtype: torch.dtype = torch.float32) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae: SparseAutoencoder
    if kind == "topk":
        sae = FusedTopKSAE(D_IN, D_SAE, k=5, rescale_acts_by_decoder_norm=False, dtype=dtype)
    elif kind == "batchtopk":
        sae = FusedBatchTopKSAE(D_IN, D_SAE, k=5, rescale_acts_by_decoder_norm=False, dtype=dtype)
    elif kind == "relu":
        sae = FusedReLUSAE(D_IN, D_SAE, dtype=dtype)
    else:
        sae = FusedJumpReLUSAE(D_IN, D_SAE, bandwidth=0.3, init_threshold=0.4, dtype=dtype)
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-3, 0.3, D_SAE))  # some features fire rarely
    return sae


def batch(step: int, n: int = N) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(step))


def loss_of(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    if isinstance(sae, FusedJumpReLUSAE):
        return sae.training_forward(x, 0.1).loss
    if isinstance(sae, FusedReLUSAE):
        return sae.training_forward(x, 0.1).loss
    return sae.training_forward(x).loss  # type: ignore[attr-defined, no-any-return]


def with_more(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return loss_of(sae, x) + sae.W_enc.square().sum() + (sae.W_dec[3] * x[0]).sum()


class Unfused:
    """What a user writes with autograd and `torch.optim.Adam`."""

    def __init__(self, sae: SparseAutoencoder, max_grad_norm: float | None, normalize: bool, **options: Any) -> None:
        self.sae, self.max_grad_norm, self.normalize = sae, max_grad_norm, normalize
        self.optimizer = torch.optim.Adam(sae.parameters(), fused=True, **options)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        W_dec = self.sae.W_dec
        assert W_dec.grad is not None
        if self.normalize:
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.normalize:
            self.sae.normalize_decoder_()


def pair(kind: str = "jumprelu", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """The fused and the unfused optimiser, each with an SAE of its own."""
    clip, normalize = options.pop("max_grad_norm", None), options.pop("normalize_decoder", False)
    sae = make(kind, dtype)
    return (
        FusedSAEAdam(copy.deepcopy(sae), max_grad_norm=clip, normalize_decoder=normalize, **options),
        Unfused(sae, clip, normalize, **{name: options[name] for name in ("lr", "betas") if name in options}),
    )


def trio(kind: str = "jumprelu", **options: Any) -> tuple[Any, Any, Any]:
    """Both in fp32, and the unfused one in fp64 from the same weights."""
    fused, unfused = pair(kind, torch.float32, **options)
    _, exact = pair(kind, **options)
    exact.sae.load_state_dict(unfused.sae.state_dict())
    return fused, unfused, exact


def assert_as_close_as_rounding_allows(fused: Any, unfused: Any, exact: Any) -> None:
    for name, want in exact.sae.state_dict().items():
        errors = [(o.sae.state_dict()[name].cpu() - want).abs().max().item() for o in (fused, unfused)]
        assert errors[0] <= 2 * errors[1] + 1e-6, f"{name}: {errors}"


def send_back(optimizer: Any, loss: Tensor) -> None:
    """By the optimiser's own `backward`, where it has one."""
    getattr(optimizer, "backward", Tensor.backward)(loss)


def train(optimizer: Any, steps: range, backend: Backend = "cpu", loss: Callable[..., Tensor] = loss_of) -> list[float]:
    losses = []
    for step in steps:
        with kernels.use_backend(backend):
            value = loss(optimizer.sae, batch(step).to(optimizer.sae.dtype))
            optimizer.zero_grad()
            send_back(optimizer, value)
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_same(fused: Any, unfused: Any, tolerance: float) -> None:
    for name, want in unfused.sae.state_dict().items():
        torch.testing.assert_close(fused.sae.state_dict()[name], want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "steps", "normalize", "clip", "betas"),
    [
        ("jumprelu", 200, True, 0.5, (0.9, 0.999)),
        ("jumprelu", 200, True, None, (0.0, 0.99)),
        ("jumprelu", 40, False, None, (0.9, 0.999)),
        ("relu", 40, True, None, (0.9, 0.999)),
        ("topk", 40, False, 0.5, (0.0, 0.99)),
        ("batchtopk", 40, True, 0.5, (0.9, 0.999)),
    ],
    ids=str,
)
def test_equal_to_unfused(
    kind: str,
    steps: int,
    normalize: bool,
    clip: float | None,
    betas: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastsae.optim.CHUNK_ELEMENTS", 7 * D_IN)  # several chunks, the last one shorter
    options = {"lr": 3e-3, "betas": betas, "max_grad_norm": clip, "normalize_decoder": normalize}
    fused, unfused = pair(kind, **options)
    losses = [train(optimizer, range(steps)) for optimizer in (fused, unfused)]
    torch.testing.assert_close(*(torch.tensor(values) for values in losses), rtol=1e-9, atol=1e-9)
    assert_same(fused, unfused, 1e-9)
    assert fused.sae.W_enc.grad is None
    assert unfused.sae.W_enc.grad is not None
    if normalize:
        torch.testing.assert_close(fused.sae.decoder_norms(), torch.ones(D_SAE, dtype=torch.float64))


def test_fp32_stays_as_close_as_rounding_allows() -> None:
    optimizers = trio(lr=3e-3, max_grad_norm=1.0, normalize_decoder=True)
    for optimizer in optimizers:
        train(optimizer, range(50))
    assert_as_close_as_rounding_allows(*optimizers)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clipped"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)], ids=str)
def test_gradients_that_come_another_way_are_added(betas: tuple[float, float], clip: float | None) -> None:
    fused, unfused = pair(lr=1e-3, betas=betas, max_grad_norm=clip)
    for loss, backend, steps in [
        (loss_of, "cpu", range(5)),
        (with_more, "cpu", range(5, 9)),
        (loss_of, "dense", range(9, 12)),
    ]:
        for optimizer in (fused, unfused):
            train(optimizer, steps, backend, loss)
    assert_same(fused, unfused, 1e-9)


def test_accumulated_passes_are_summed() -> None:
    fused, unfused = pair(lr=1e-3)
    for optimizer in (fused, unfused):
        for step in range(4):
            optimizer.zero_grad()
            for part in range(3):
                send_back(optimizer, loss_of(optimizer.sae, batch(10 * step + part, n=5 + part).double()))
            optimizer.step()
    assert_same(fused, unfused, 1e-9)


def test_rows_that_no_token_touches_are_left_alone_and_exact() -> None:
    fused, unfused = pair(lr=1e-2, betas=(0.0, 0.9))
    for optimizer in (fused, unfused):
        with torch.no_grad():
            optimizer.sae.b_enc[:10] = -50.0  # never
            optimizer.sae.b_enc[10:20] = -2.0  # now and then
        train(optimizer, range(30))
    for last_step in fused._owed.last_step.values():
        assert (last_step[:10] == 0).all()
        assert (last_step[10:] > 0).all()
        assert (last_step[10:20] < 30).any()
    assert_same(fused, unfused, 1e-9)
    ours, theirs = fused.state_dict()["state"], unfused.optimizer.state_dict()["state"]
    for index in theirs:  # the decay that untouched rows owe has been applied
        torch.testing.assert_close(ours[index]["exp_avg_sq"], theirs[index]["exp_avg_sq"])
    assert not fused._owed.last_step


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)], ids=str)
@pytest.mark.parametrize("to_fused", [True, False], ids=["theirs to ours", "ours to theirs"])
def test_state_dict_is_that_of_torch_adam(to_fused: bool, betas: tuple[float, float]) -> None:
    fused, unfused = pair(lr=1e-3, betas=betas, normalize_decoder=True)
    for optimizer in (fused, unfused):
        train(optimizer, range(20))
    source, target = (unfused, fused) if to_fused else (fused, unfused)
    state = copy.deepcopy(getattr(source, "optimizer", source).state_dict())
    fresh = pair(lr=0.5, betas=betas, normalize_decoder=True)[0 if to_fused else 1]
    fresh.sae.load_state_dict(target.sae.state_dict())
    getattr(fresh, "optimizer", fresh).load_state_dict(state)
    for optimizer in (fresh, source):
        train(optimizer, range(20, 40))
    assert_same(fresh, source, 1e-9)


def test_a_narrow_first_moment_trains_alike() -> None:
    sae = make()
    optimizers = [
        FusedSAEAdam(copy.deepcopy(sae), lr=3e-3, exp_avg_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    losses = [train(optimizer, range(200)) for optimizer in optimizers]
    assert optimizers[1].state[optimizers[1].sae.W_enc]["exp_avg"].dtype == torch.bfloat16
    assert losses[1] != losses[0]
    late = [sum(values[-20:]) for values in losses]
    assert abs(late[1] - late[0]) < 0.05 * late[0]


@contextmanager
def on_kernels(capacity: int, overflowed: list[int]) -> Iterator[None]:
    """Triton, `capacity` entries per row; notes how many rows overflowed in each pass that leaves its share."""
    from fastsae_kernels.gpu import autoencode, config
    from fastsae_kernels.gpu.weight_gradients import gpu_share

    def counted(*arguments: Any) -> Any:
        overflowed.append(int(arguments[6]))
        return gpu_share(*arguments)

    rows_of = {name: {"BLOCK_E": 1, "D_PER_WARP": 512} for name in ("adam_rows", "feature_sums")}
    table = {name: {"16": tiles, "32": tiles} for name, tiles in (FEW_PROGRAMS | rows_of).items()}
    with (
        mock.patch.object(autoencode, "gpu_share", counted),
        mock.patch.object(kernels.ActivityHint, "capacity", return_value=Capacity(capacity, capacity)),
        config.override(table) if DEVICE == "cpu" else nullcontext(),
    ):
        yield


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize(
    ("betas", "clip", "normalize"),
    [((0.9, 0.999), None, False), ((0.9, 0.999), 0.5, True), ((0.0, 0.9), None, True), ((0.0, 0.9), 0.5, False)],
    ids=str,
)
def test_steps_of_every_kind(betas: tuple[float, float], clip: float | None, normalize: bool, backend: Backend) -> None:
    """Rows overflow in some steps; accumulated, dense and mixed steps between, changed rates and weights, swapped states."""
    options = {"lr": 3e-3, "betas": betas, "max_grad_norm": clip, "normalize_decoder": normalize}
    fused, unfused, exact = trio(**options, compute_dtype=torch.float16)
    fused.sae.to(DEVICE if backend == "triton" else "cpu")
    overflowed: list[int] = []

    def step(optimizer: Any, at: int, backend: Backend) -> None:
        optimizer.zero_grad()
        for part in range(1 + (at in (5, 6))):
            x = batch(100 + 2 * at + part, 6).to(optimizer.sae.W_enc)
            with kernels.use_backend("dense" if at in (12, 20) or (part and at == 6) else backend):
                send_back(optimizer, (with_more if at == 14 else loss_of)(optimizer.sae, x))
        optimizer.step()

    for at in range(24):
        matrices = (fused.sae.W_enc, fused.sae.W_dec)
        for optimizer in (fused, unfused, exact):
            getattr(optimizer, "optimizer", optimizer).param_groups[0]["lr"] = 3e-3 if at < 10 else 1e-3
            if at == 18:
                with torch.no_grad():
                    optimizer.sae.W_dec[::2] *= 1.1
        assert (fused._copies.of(fused.sae.W_dec) is None) == (at == 18)
        versions = [p._version for p in matrices]
        for optimizer in (unfused, exact):
            step(optimizer, at, "cpu")
        capacity = (D_SAE - 1, 4, D_SAE // 2)[at % 3]
        with on_kernels(capacity, overflowed) if backend == "triton" else nullcontext():
            step(fused, at, backend)
        leaves_grad = at in (6, 12, 14, 20) or (at == 5 and backend == "triton")
        assert (matrices[0].grad is not None) == leaves_grad
        assert_as_close_as_rounding_allows(fused, unfused, exact)
        for p, version in zip(matrices, versions, strict=True):
            assert torch.equal(fused._copies.of(p), p.half())
            assert p._version > version
        if at == 16:
            ours, theirs = copy.deepcopy(fused.state_dict()), copy.deepcopy(unfused.optimizer.state_dict())
            for index, state in theirs["state"].items():
                torch.testing.assert_close(ours["state"][index]["step"].cpu(), state["step"])
                second = ours["state"][index]["exp_avg_sq"].cpu()
                torch.testing.assert_close(second, state["exp_avg_sq"], rtol=1e-3, atol=1e-8)
            fused = FusedSAEAdam(fused.sae, **options, compute_dtype=torch.float16)  # type: ignore[arg-type]
            fused.load_state_dict(theirs)
            unfused.optimizer.load_state_dict(ours)
    assert len(overflowed) == (22 if backend == "triton" else 0)
    assert backend == "cpu" or 5 < sum(n > 0 for n in overflowed) < 17
    if betas[0] == 0:
        assert min(last_step.min() for last_step in fused._owed.last_step.values()) < 24


def test_autocast_and_frozen_weights() -> None:
    for frozen in (False, True):
        fused, unfused = pair(dtype=torch.float32, lr=1e-3)
        for optimizer in (fused, unfused):
            optimizer.sae.W_enc.requires_grad_(not frozen)
            before = optimizer.sae.W_enc.detach().clone()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss_of(optimizer.sae, batch(0))
            send_back(optimizer, value)
            optimizer.step()
            assert torch.equal(optimizer.sae.W_enc, before) == frozen
        assert_same(fused, unfused, 1e-6)


def test_whole_graphs_leave_their_gradients_where_they_are_found() -> None:
    fused, unfused = pair(lr=1e-3)
    for optimizer in (fused, unfused):
        compiled = torch.compile(optimizer.sae, fullgraph=True, backend="aot_eager")
        send_back(optimizer, (compiled(batch(0).double()) - batch(0).double()).square().sum())
        assert optimizer.sae.W_enc.grad is not None
        optimizer.step()
    assert_same(fused, unfused, 1e-9)


def test_copies_and_orphans_train_by_autograd_again() -> None:
    sae = make()
    optimizer = FusedSAEAdam(sae)
    twin = copy.deepcopy(sae)
    loss_of(twin, batch(0)).backward()
    assert twin.W_enc.grad is not None
    assert optimizer.sae.W_enc.grad is None
    del optimizer
    gc.collect()
    loss_of(sae, batch(0)).backward()
    torch.testing.assert_close(sae.W_enc.grad, twin.W_enc.grad)


def test_steps_without_gradients_change_nothing() -> None:
    sae = make()
    before = copy.deepcopy(sae.state_dict())
    optimizer = FusedSAEAdam(sae, max_grad_norm=1.0)
    optimizer.step()
    loss_of(sae, batch(0)).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert optimizer.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype"),
        ({"compute_dtype": torch.float32}, "compute_dtype"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        FusedSAEAdam(make(), **options)
    with pytest.raises(UsageError, match="sae"):
        FusedSAEAdam(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
