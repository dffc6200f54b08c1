"""What the optimiser is made of, copied with, saved to and loaded from: the same state, or one error before anything changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adam_problem import (
    D_IN,
    D_SAE,
    Run,
    SendBack,
    adam,
    assert_same_as_adam,
    batch,
    both_ways,
    fresh,
    fused,
    loss_of,
    refused,
    weights,
)

from fastsae import FusedJumpReLUSAE, FusedSAEAdam, UsageError


def test_parametrized_weights_are_refused() -> None:
    sae = fresh()
    torch.nn.utils.parametrize.register_parametrization(sae, "W_dec", torch.nn.Tanh())
    with pytest.raises(UsageError, match="W_dec to be a plain parameter, got a parametrization"):
        FusedSAEAdam(sae)


def test_matrices_beside_the_sae_keep_wide_moments() -> None:
    sae, linear = fresh(), torch.nn.Linear(D_IN, D_IN)
    optimizer = fused(sae, exp_avg_dtype=torch.bfloat16)
    optimizer.add_param_group({"params": linear.parameters()})
    optimizer.backward(loss_of(sae, linear(batch(0))))
    optimizer.step()
    assert optimizer.state[sae.W_enc]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[linear.weight]["exp_avg"].dtype == torch.float32


def test_weights_in_the_same_memory_are_refused() -> None:
    sae = fresh()
    sae.W_dec.data = sae.W_enc.data.t()
    with pytest.raises(UsageError, match="W_enc and W_dec in memory of their own"):
        FusedSAEAdam(sae)
    assert sae.W_dec.data_ptr() == sae.W_enc.data_ptr()


@pytest.mark.parametrize("value", ["1", 0, -1.0, torch.nan, torch.inf])
def test_odd_norms_are_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="max_grad_norm: expected None or a number > 0"):
        fused(fresh(), max_grad_norm=value)


@both_ways
def test_an_sae_that_was_moved_is_refused_until_the_state_follows(send_back: SendBack) -> None:
    sae = fresh()
    optimizer = fused(sae)
    send_back(optimizer, loss_of(sae, batch(0)))
    optimizer.step()
    optimizer.zero_grad()
    sae.double()
    before = weights(sae)
    send_back(optimizer, loss_of(sae, batch(1)))
    with refused(sae, r"expected torch.float32 on cpu .* got torch.float64"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not torch.equal(before["W_enc"], sae.W_enc)


@both_ways
@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(by: str, send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        torch.optim.lr_scheduler.StepLR(run.optimizer, 2)  # it wraps the optimiser's step
        run.step(0)
        pair = (run.sae, run.optimizer)
        twin, twins = copy.deepcopy(pair) if by == "deepcopy" else pickle.loads(pickle.dumps(pair))
        for module, owner, x in ((twin, twins, batch(1)), (*pair, batch(2))):
            owner.zero_grad()
            run.send_back(owner, loss_of(module, x))
            owner.step()
        run.others = {f"twin {name}": tensor for name, tensor in weights(twin).items()}

    assert_same_as_adam(scenario, send_back, betas=(0.0, 0.9))


def test_a_copy_keeps_options_and_16_bit_copies() -> None:
    sae = fresh()
    optimizer = fused(sae, max_grad_norm=0.5, normalize_decoder=True, compute_dtype=torch.bfloat16)
    twin, twins = copy.deepcopy((sae, optimizer))
    for module, owner in ((sae, optimizer), (twin, twins)):
        for step in range(3):
            owner.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(module, batch(step))
            owner.backward(loss)
            owner.step()
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["amsgrad", "decoupled_weight_decay"])
def test_options_that_it_lacks_are_refused(name: str) -> None:
    sae = fresh()
    optimizer = fused(sae)
    if name == "amsgrad":
        state = adam(sae, amsgrad=True).state_dict()
        with pytest.raises(UsageError, match="amsgrad"):
            optimizer.load_state_dict(state)
    loss_of(sae, batch(0)).backward()
    optimizer.param_groups[0][name] = True
    with refused(sae, name):
        optimizer.step()


def test_a_state_of_other_shapes_is_refused() -> None:
    sae, other = fresh(), FusedJumpReLUSAE(D_IN, D_SAE // 2)
    theirs = adam(other)
    loss_of(other, batch(0)).backward()
    theirs.step()
    optimizer = fused(sae)
    with pytest.raises(UsageError, match=r"state_dict: expected two moments of shape \(16, 128\) at 0, got"):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state


def state_without_steps() -> dict[str, Any]:
    sae = fresh()
    optimizer = adam(sae)
    loss_of(sae, batch(0)).backward()
    optimizer.step()
    state = optimizer.state_dict()
    for of_parameter in state["state"].values():
        del of_parameter["step"]
    return state


FOREIGN: dict[str, Callable[[], Any]] = {
    "SGD": lambda: torch.optim.SGD(fresh().parameters(), lr=0.1).state_dict(),
    "LBFGS": lambda: torch.optim.LBFGS(fresh().parameters()).state_dict(),
    "without steps": state_without_steps,
    "empty": dict,
    "none": lambda: None,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_state_of_another_kind_is_refused(name: str) -> None:
    optimizer = fused(fresh())
    before = optimizer.state_dict()
    with pytest.raises(UsageError, match="state_dict: expected"):
        optimizer.load_state_dict(FOREIGN[name]())
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("fused_adam", [False, True])
def test_torch_adam_goes_on_with_the_same_sae(fused_adam: bool) -> None:
    """Its fused kernel would take contiguous moments for those of weights that are stored by feature."""

    def scenario(run: Run) -> None:
        for step in range(4):
            if step == 2:
                state = run.optimizer.state_dict()
                run.optimizer = adam(run.sae, fused=fused_adam)
                run.optimizer.load_state_dict(state)
            run.step(step)

    assert_same_as_adam(scenario)
