"""Gradients between `backward` and `step`: nothing reads, loses or holds them in silence."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from adam_problem import (
    Run,
    SendBack,
    assert_same_as_adam,
    batch,
    both_ways,
    by_itself,
    explicitly,
    fresh,
    fused,
    loss_of,
    refused,
    weights,
)
from gpu_helpers import DEVICE, FEW_PROGRAMS, needs_kernels
from torch import Tensor

import fastsae_kernels as kernels
from fastsae import FusedJumpReLUSAE, FusedSAEAdam, UsageError


@both_ways
@pytest.mark.parametrize("how", ["module", "optimizer", "none"])
def test_what_is_thrown_away_is_gone(how: str, send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        run.send_back(run.optimizer, loss_of(run.sae, batch(0)) * torch.nan)
        if how == "none":
            for p in run.sae.parameters():
                p.grad = None
        else:
            (run.sae if how == "module" else run.optimizer).zero_grad()
        for step in range(2):
            run.send(step)
            run.optimizer.step()
            run.sae.zero_grad()

    assert_same_as_adam(scenario, send_back)


READERS: dict[str, Callable[[FusedJumpReLUSAE], object]] = {
    "clip_grad_norm_": lambda sae: torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0),
    "clip_grad_value_": lambda sae: torch.nn.utils.clip_grad_value_(sae.parameters(), 1.0),
    "norm": lambda sae: sae.W_dec.grad.norm(),  # type: ignore[union-attr]
    "item": lambda sae: sae.W_enc.grad[0, 0].item(),  # type: ignore[index]
    "clone": lambda sae: sae.W_enc.grad.clone(),  # type: ignore[union-attr]
    "in place": lambda sae: sae.W_dec.grad.mul_(0.5),  # type: ignore[union-attr]
    "zero_grad in place": lambda sae: sae.zero_grad(set_to_none=False),
    "loss.backward": lambda sae: loss_of(sae, batch(1)).backward(),
    "flatten": lambda sae: torch.cat([p.grad.reshape(-1) for p in sae.parameters()]),  # type: ignore[union-attr]
    "numpy": lambda sae: sae.W_enc.grad.numpy(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("name", READERS)
def test_nothing_reads_a_pending_gradient_in_silence(name: str) -> None:
    sae = fresh()
    optimizer, before = fused(sae), weights(sae)
    optimizer.backward(loss_of(sae, batch(0)))
    assert sae.b_dec.grad is not None
    assert "PendingGradient" in repr(sae.W_enc.grad)
    with pytest.raises((UsageError, RuntimeError), match=r"W_\w+\.grad.*loss\.backward\(\)|numpy"):
        READERS[name](sae)
    assert all(torch.equal(before[n], p) for n, p in sae.named_parameters())
    optimizer.zero_grad()
    assert sae.W_enc.grad is None


def test_grad_scaler_names_itself_with_pending_gradients() -> None:
    sae = fresh()
    optimizer = fused(sae)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.backward(scaler.scale(loss_of(sae, batch(0))))
    with refused(sae, "GradScaler"):
        scaler.step(optimizer)


@pytest.mark.parametrize("what", ["x", "residual"])
def test_what_a_pending_gradient_is_summed_from_must_stay(what: str) -> None:
    sae, x = fresh(), batch(0)
    optimizer, before = fused(sae), weights(sae)
    output = sae.training_forward(x)
    optimizer.backward(output.loss)
    (x if what == "x" else output.residual.detach()).mul_(2.0)
    with refused(sae, "overwritten in place"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(loss_of(sae, x))
    optimizer.step()
    assert not torch.equal(before["W_enc"], sae.W_enc)


@pytest.mark.parametrize("end", ["step", "another micro-batch"])
def test_a_buffer_of_several_micro_batches_is_refused(end: str) -> None:
    sae, x = fresh(), batch(0)
    optimizer = fused(sae)
    optimizer.backward(loss_of(sae, x))
    x.copy_(batch(1))
    go_on = optimizer.step if end == "step" else partial(optimizer.backward, loss_of(sae, x))
    with refused(sae, "overwritten in place"):
        go_on()


def test_an_overwritten_input_does_not_matter_to_whole_gradients() -> None:
    def scenario(run: Run) -> None:
        x = batch(0)
        for step in range(3):
            run.optimizer.zero_grad()
            run.send_back(run.optimizer, loss_of(run.sae, x))
            x.copy_(batch(1 + step))
            run.optimizer.step()

    assert_same_as_adam(scenario)


def test_anothers_pending_gradient_is_refused() -> None:
    sae = fresh()
    first, second = fused(sae), fused(sae)
    first.backward(loss_of(sae, batch(0)))
    with refused(sae, "another optimiser's backward"):
        second.step()
    with refused(sae, "W_enc"):
        second.backward(loss_of(sae, batch(0)))


def test_micro_batches_under_bf16_add_up_in_fp32() -> None:
    """64 small, nearly equal shares: sums in bf16 would lose the late ones."""
    x = batch(0)
    found = []
    for send_back in (by_itself, explicitly):
        sae = fresh()
        optimizer = fused(sae, lr=1e3, eps=1e3)  # the step is nearly proportional to the gradient
        before = weights(sae)
        for part in range(64):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(sae, x + 0.1 * batch(part)) / 64
            send_back(optimizer, loss)
        optimizer.step()
        found.append({name: (before[name] - p).double() for name, p in sae.named_parameters()})
    for name, want in found[0].items():
        assert (found[1][name] - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("end", ["step", "optimizer.zero_grad", "sae.zero_grad"])
def test_nothing_is_held_longer_than_it_is_needed(end: str) -> None:
    sae, x = fresh(), batch(0)
    optimizer, twin = fused(sae), weakref.ref(x.untyped_storage())
    optimizer.backward(loss_of(sae, x))
    del x
    gc.collect()
    assert twin() is not None
    {"step": optimizer.step, "optimizer.zero_grad": optimizer.zero_grad, "sae.zero_grad": sae.zero_grad}[end]()
    optimizer.backward(loss_of(sae, batch(1)))
    gc.collect()
    assert twin() is None


def test_an_input_that_was_thrown_away_may_change() -> None:
    sae, x = fresh(), batch(0)
    optimizer = fused(sae)
    optimizer.backward(loss_of(sae, x))
    sae.zero_grad()
    x.copy_(batch(1))
    loss_of(sae, x).backward()
    optimizer.step()


def test_capture_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = fresh()
    optimizer = fused(sae)
    loss_of(sae, batch(0)).backward()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with refused(sae, "CUDA graph"):
        optimizer.step()


@needs_kernels
@pytest.mark.parametrize("frozen", [None, "W_enc"])
def test_on_the_kernels(frozen: str | None) -> None:
    """One pass, two passes, gradients thrown away, whole gradients, and an input that was overwritten."""

    tiles = small_tiles()

    def scenario(run: Run) -> None:
        sae = run.sae.to(DEVICE)
        run.optimizer = optimizer = run.make(sae, eps=1e-3)  # or what is left of gradients that cancel would count
        if frozen:
            getattr(sae, frozen).requires_grad_(False)

        def send(step: int, by: SendBack = explicitly) -> Tensor:
            x = batch(step)[:6].to(DEVICE)
            with kernels.use_backend("triton" if isinstance(optimizer, FusedSAEAdam) else None), tiles:
                by(optimizer, loss_of(sae, x))
            return x

        for step in range(4):
            optimizer.zero_grad()
            send(step)
            if step == 1:
                send(10)
            if step == 2:
                sae.zero_grad()
                send(20)
                send(21)
            if step == 3:
                optimizer.zero_grad()
                send(30, by_itself)
            with tiles:
                optimizer.step()
        if isinstance(optimizer, FusedSAEAdam) and frozen != "W_enc":  # whose gradient alone needs x
            optimizer.zero_grad()
            x = send(40)
            x.zero_()
            with pytest.raises(UsageError, match="overwritten"):
                optimizer.step()

    assert_same_as_adam(scenario)


@needs_kernels
def test_what_the_kernel_cannot_update_is_summed_first() -> None:
    """Here because of `maximize`; with `betas[0] == 0` the rows without entries are not left alone then."""
    found = []
    for send_back in (by_itself, explicitly):
        sae = fresh().to(DEVICE)
        optimizer = fused(sae, betas=(0.0, 0.9), eps=1e-3)
        optimizer.param_groups[0]["maximize"] = True
        with kernels.use_backend("triton"), small_tiles():
            send_back(optimizer, loss_of(sae, batch(0)[:2].to(DEVICE)))
        optimizer.step()
        found.append(weights(sae))
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, msg=lambda text, name=name: f"{name}: {text}")


def small_tiles() -> Any:
    """Tiles that Triton's interpreter gets through in time."""
    from fastsae_kernels.gpu import config

    rows = {name: {"BLOCK_E": 1, "D_PER_WARP": 512} for name in ("adam_rows", "feature_sums")}
    table = {name: {"16": row, "32": row} for name, row in (FEW_PROGRAMS | rows).items()}
    return contextlib.nullcontext() if DEVICE != "cpu" else Reused(lambda: config.override(table))


class Reused:
    """A context manager that can be entered again, from a function that makes one."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.current = self.make()
        self.current.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.current.__exit__(*error)
