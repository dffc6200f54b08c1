"""What users of PyTorch do with an optimiser: the weights that `torch.optim.Adam` gives."""

from __future__ import annotations

import collections

import pytest
import torch
from adam_problem import (
    D_IN,
    D_SAE,
    Run,
    SendBack,
    assert_same_as_adam,
    batch,
    both_ways,
    fresh,
    fused,
    loss_of,
    weights,
)
from torch import Tensor


@pytest.mark.parametrize("init_threshold", [0.0, 2.0], ids=["dense", "sparse"])
def test_every_parameter_has_its_whole_gradient(init_threshold: float) -> None:
    plain, sae = fresh(init_threshold), fresh(init_threshold)
    optimizer = fused(sae)
    for module in (plain, sae):
        loss_of(module, batch(0)).backward()
    for (name, p), want in zip(sae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, want.grad, msg=lambda text, name=name: f"{name}: {text}")
    del optimizer


@both_ways
def test_steps_with_closures_and_schedules(send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, 0.5)
        for step in range(6):

            def closure(step: int = step) -> Tensor:
                run.optimizer.zero_grad()
                loss = loss_of(run.sae, batch(step))
                run.send_back(run.optimizer, loss)
                return loss

            assert run.optimizer.step(closure) > 0
            schedule.step()

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_gradients_that_are_zeroed_in_place(send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        for step in range(3):
            run.optimizer.zero_grad(set_to_none=False)
            run.send(step)
            run.optimizer.step()

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_a_gradient_of_the_input_leaves_no_trace(send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        for step in range(3):
            run.optimizer.zero_grad()
            run.send(step)
            x = batch(10 + step).requires_grad_()
            torch.autograd.grad(run.sae(x).square().sum(), x)
            torch.autograd.grad(loss_of(run.sae, batch(20)), [run.sae.W_enc, run.sae.W_dec])
            run.optimizer.step()

    assert_same_as_adam(scenario, send_back)


@both_ways
@pytest.mark.parametrize(
    "frozen", [("W_enc",), ("W_dec",), ("W_enc", "W_dec"), ("b_enc", "b_dec", "threshold")], ids=str
)
def test_frozen_parameters_stay(frozen: tuple[str, ...], send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        for step in range(4):
            for name in frozen:
                getattr(run.sae, name).requires_grad_(step == 3)
            run.step(step)

    assert_same_as_adam(scenario, send_back)


@both_ways
@pytest.mark.parametrize("frozen", [("W_enc",), ("W_dec",), ("W_enc", "W_dec")], ids=str)
def test_parameters_that_are_frozen_after_the_forward_pass_stay(frozen: tuple[str, ...], send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        for step in range(3):
            run.optimizer.zero_grad()
            run.send(step)
            loss = loss_of(run.sae, batch(10 + step))
            for name in frozen:
                getattr(run.sae, name).requires_grad_(False)
            run.send_back(run.optimizer, loss)
            run.optimizer.step()
            run.sae.requires_grad_(True)

    assert_same_as_adam(scenario, send_back)


@both_ways
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_micro_batches_whose_loss_has_another_term_of_a_weight(name: str, send_back: SendBack) -> None:
    """The gradient of one matrix is whole after the first of them, that of the other still pending."""

    def scenario(run: Run) -> None:
        for step in range(6):
            term = 0.1 * getattr(run.sae, name).square().sum()
            run.send_back(run.optimizer, loss_of(run.sae, batch(step)) + term)
            if step % 3 == 2:
                run.optimizer.step()
                run.optimizer.zero_grad()

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_betas_may_change(send_back: SendBack) -> None:
    """Rows that were left alone owe the decay of the rate of then, and their first moment is 0."""

    def scenario(run: Run) -> None:
        for step, betas in enumerate([(0.0, 0.9), (0.0, 0.9), (0.0, 0.5), (0.0, 0.5), (0.5, 0.8), (0.5, 0.8)]):
            run.optimizer.param_groups[0]["betas"] = betas
            run.step(step)

    assert_same_as_adam(scenario, send_back, eps=1e-3)


@both_ways
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.9)])
def test_a_state_that_is_thrown_away_begins_anew(betas: tuple[float, float], send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        for step in range(6):
            if step == 2:
                run.optimizer.state.clear()
            if step == 4:
                run.optimizer.state = collections.defaultdict(dict)
                assert run.optimizer.state_dict()["state"] == {}
            run.step(step)

    assert_same_as_adam(scenario, send_back, betas=betas, eps=1e-3)


@both_ways
def test_hooks_on_the_gradient_run(send_back: SendBack) -> None:
    """The encoder is trained on every second feature alone; the decoder's gradient is seen once it is whole."""

    def scenario(run: Run) -> None:
        seen: list[Tensor] = []
        mask = (torch.arange(D_SAE) % 2).float()
        run.sae.W_enc.register_hook(lambda grad: grad * mask)
        run.sae.W_dec.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
        run.optimizer = run.make(run.sae)  # which finds the hooks
        for step in range(3):
            run.step(step)
        run.others["seen"] = torch.stack(seen)

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_two_optimizers_on_one_sae(send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        optimizers = run.optimizer, run.make(run.sae, lr=1e-3)
        for step in range(4):
            run.sae.zero_grad()
            run.send_back(optimizers[step % 2], loss_of(run.sae, batch(step)))
            optimizers[step % 2].step()

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_two_saes_in_one_loss(send_back: SendBack) -> None:
    """The first one's optimiser sends the loss back; the second has its gradients where any optimiser finds them."""

    def scenario(run: Run) -> None:
        other = fresh(1.5)
        optimizers = [run.optimizer, run.make(other)]
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            x = batch(step)
            run.send_back(run.optimizer, loss_of(run.sae, x) + loss_of(other, run.sae(x)))
            for optimizer in optimizers:
                optimizer.step()
        run.others = {f"other {name}": p for name, p in weights(other).items()}

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_parameters_of_others_are_not_taken(send_back: SendBack) -> None:
    """A functional call with another SAE's parameters, and a weight that is computed from others since."""

    def scenario(run: Run) -> None:
        other = fresh(1.5)
        out = torch.func.functional_call(run.sae, dict(other.named_parameters()), (batch(0),))
        run.send_back(run.optimizer, (out - batch(0)).square().sum())
        run.others = {f"grad {name}": p.grad.clone() for name, p in other.named_parameters() if p.grad is not None}
        assert all(p.grad is None for p in run.sae.parameters())
        torch.nn.utils.parametrize.register_parametrization(run.sae, "W_dec", torch.nn.Tanh())
        run.send(1)
        run.optimizer.step()

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_parameters_beside_the_sae(send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        gain = torch.nn.Parameter(torch.ones(D_IN))
        run.optimizer.add_param_group({"params": [gain], "lr": 0.1})
        for step in range(3):
            run.optimizer.zero_grad()
            run.send_back(run.optimizer, loss_of(run.sae, batch(step) * gain))
            run.optimizer.step()
        assert len(run.optimizer.state_dict()["param_groups"]) == 2
        run.others["gain"] = gain.detach()

    assert_same_as_adam(scenario, send_back)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("clips", [False, True])
def test_grad_scaler(clips: bool, scale: float) -> None:
    """It unscales, skips the step whose gradients overflow, and clipping sees the unscaled norm."""

    def scenario(run: Run) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(4):
            run.optimizer.zero_grad()
            loss = loss_of(run.sae, batch(step)) * (torch.inf if step == 1 else 1)
            scaler.scale(loss).backward()
            if clips:
                scaler.unscale_(run.optimizer)
                torch.nn.utils.clip_grad_norm_(run.sae.parameters(), 0.5)
            scaler.step(run.optimizer)
            scaler.update()
        run.others["scale"] = torch.tensor(scaler.get_scale())

    assert_same_as_adam(scenario, eps=1e-2)  # a small one would hide the scale


def test_own_clipping_sees_the_unscaled_norm() -> None:
    found = []
    for scale in (1.0, 2.0**12):
        sae = fresh()
        optimizer = fused(sae, eps=1e-2, max_grad_norm=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(sae, batch(0))).backward()
        scaler.step(optimizer)
        found.append(weights(sae))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)


@both_ways
@pytest.mark.parametrize("explicit_weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_options_of_the_group(maximize: bool, explicit_weight_decay: float, send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        run.optimizer.param_groups[0] |= {"maximize": maximize, "weight_decay": explicit_weight_decay}
        for step in range(3):
            run.step(step)

    assert_same_as_adam(scenario, send_back)


@both_ways
def test_averages_of_the_weights(send_back: SendBack) -> None:
    def scenario(run: Run) -> None:
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        average = torch.optim.swa_utils.AveragedModel(run.sae, multi_avg_fn=ema)
        for step in range(4):
            run.step(step)
            average.update_parameters(run.sae)
        run.others = {f"average {name}": p.detach() for name, p in average.module.named_parameters()}

    assert_same_as_adam(scenario, send_back)
