"""What users of PyTorch do with an optimiser: the weights that `torch.optim.Adam` gives, or one error before anything changes."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from gpu_helpers import DEVICE, FEW_PROGRAMS, needs_kernels
from torch import Tensor

import fastsae_kernels as kernels
from fastsae import FusedJumpReLUSAE, FusedSAEAdam, UsageError

D_IN, D_SAE, N = 16, 128, 48
State = dict[str, Tensor]


def fresh(init_threshold: float = 2.0) -> FusedJumpReLUSAE:
    torch.manual_seed(0)
    return FusedJumpReLUSAE(D_IN, D_SAE, bandwidth=0.3, init_threshold=init_threshold)


def batch(seed: int) -> Tensor:
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed))


def adam(sae: FusedJumpReLUSAE, **options: Any) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), **{"lr": 1e-2, **options})


def fused(sae: FusedJumpReLUSAE, **options: Any) -> FusedSAEAdam:
    return FusedSAEAdam(sae, **{"lr": 1e-2, **options})


def weights(sae: FusedJumpReLUSAE) -> State:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


@contextlib.contextmanager
def refused(sae: FusedJumpReLUSAE, match: str) -> Iterator[None]:
    """Expects one error in the block, and the weights as they were."""
    before = weights(sae)
    with pytest.raises(UsageError, match=match):
        yield
    assert all(torch.equal(before[name], p) for name, p in sae.named_parameters())


def loss_of(sae: FusedJumpReLUSAE, x: Tensor) -> Tensor:
    return sae.training_forward(x).loss


def by_itself(optimizer: Any, loss: Tensor) -> None:
    loss.backward()


def explicitly(optimizer: Any, loss: Tensor) -> None:
    getattr(optimizer, "backward", Tensor.backward)(loss)


Make = Callable[..., Any]
SendBack = Callable[[Any, Tensor], None]
both_ways = pytest.mark.parametrize("send_back", [by_itself, explicitly])


class Run:
    """An SAE and its optimiser; a scenario trains them, once with `torch.optim.Adam` and once with ours.

    Args:
        make: Makes the optimiser of an SAE.
        send_back: Sends a loss back.
        options: The optimiser's options.
    """

    def __init__(self, make: Make, send_back: SendBack, **options: Any) -> None:
        self.make, self.send_back = make, send_back
        self.sae = fresh()
        self.optimizer = make(self.sae, **options)
        self.others: State = {}  # what is compared beside the weights

    def send(self, seed: int) -> None:
        self.send_back(self.optimizer, loss_of(self.sae, batch(seed)))

    def step(self, seed: int) -> None:
        self.optimizer.zero_grad()
        self.send(seed)
        self.optimizer.step()


def assert_same_as_adam(scenario: Callable[[Run], object], send_back: SendBack = by_itself, **options: Any) -> None:
    runs = [Run(make, send_back, **options) for make in (adam, fused)]
    for run in runs:
        scenario(run)
    want, got = ({**weights(run.sae), **run.others} for run in runs)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


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


def test_parametrized_weights_are_refused() -> None:
    sae = fresh()
    torch.nn.utils.parametrize.register_parametrization(sae, "W_dec", torch.nn.Tanh())
    with pytest.raises(UsageError, match="W_dec to be a plain parameter, got a parametrization"):
        FusedSAEAdam(sae)


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
