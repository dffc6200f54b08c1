"""`accelerate` against the real SAELens in training: the same steps, statistics and optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saelens_problem import (
    N_STEPS,
    N_TOKENS,
    TRAINED,
    MultiSAETrainer,
    SAETrainerConfig,
    TrainStepInput,
    activations,
    assert_same_losses,
    assert_same_sae,
    close,
    inference_sae,
    steps,
    trainer_of,
    training_sae,
)

from fastsae import FusedSAEAdam, accelerate
from fastsae.pending import PendingGradient


def assert_same_run(kind: str, n: int, tolerance: float, *, whole_trainer: bool, **options: Any) -> None:
    theirs, ours = (trainer_of(training_sae(kind, **options)) for _ in range(2))
    handle = accelerate(ours if whole_trainer else ours.sae)
    assert_same_losses(steps(ours, n), steps(theirs, n), tolerance)
    assert_same_sae(ours.sae, theirs.sae, 20 * tolerance)
    for name in ("act_freq_scores", "n_forward_passes_since_fired", "dead_neurons"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert handle.tally.fused["training_forward_pass"] == n
    assert not handle.tally.left
    assert bool(ours.dead_neurons.any())  # so that the auxiliary losses ran


@pytest.mark.parametrize("kind", TRAINED)
def test_fifty_steps_of_the_trainer(kind: str) -> None:
    """In fp64: within rounding of fp32 an activation lies now and then on the other side of a gate, and the runs part."""
    assert_same_run(kind, N_STEPS, 1e-7, whole_trainer=True, dtype="float64")


@pytest.mark.parametrize("whole_trainer", [True, False], ids=["trainer", "SAE alone"])
@pytest.mark.parametrize("kind", TRAINED)
def test_steps_in_fp32(kind: str, whole_trainer: bool) -> None:
    assert_same_run(kind, 6, 1e-6, whole_trainer=whole_trainer)


@pytest.mark.parametrize("kind", ["jumprelu tanh", "topk", "batchtopk"])
def test_other_dtypes_and_autocast(kind: str) -> None:
    for options, autocast, tolerance in (
        ({"dtype": "float64"}, False, 1e-6),
        ({"dtype": "bfloat16"}, False, 3e-2),
        ({}, True, 3e-2),
    ):
        pair = [trainer_of(training_sae(kind, **options), autocast=autocast) for _ in range(2)]
        handle = accelerate(pair[0])
        outputs = [trainer.step(activations(0)) for trainer in pair]
        assert close(*[output.loss.detach().float() for output in outputs], tolerance)
        assert outputs[0].sae_out.dtype == outputs[1].sae_out.dtype
        assert handle.tally.fused["training_forward_pass"] == 1


@pytest.mark.parametrize("kind", ["jumprelu", "standard", "topk", "batchtopk"])
def test_steps_under_autocast_are_as_near_to_fp32_as_theirs(kind: str) -> None:
    def losses(*, autocast: bool, fast: bool) -> torch.Tensor:
        trainer = trainer_of(training_sae(kind), autocast=autocast)
        handle = accelerate(trainer) if fast else None
        found = torch.tensor([step["loss"] for step in steps(trainer, 8)])
        if handle is not None:
            assert handle.tally.fused == {"training_forward_pass": 8, "_train_step": 8}
            assert trainer.sae.W_enc.dtype == torch.float32
        return found

    exact = losses(autocast=False, fast=False)
    theirs, ours = (losses(autocast=True, fast=fast) for fast in (False, True))
    errors = [float((found - exact).norm() / exact.norm()) for found in (ours, theirs)]
    assert 0 < errors[0] <= max(2 * errors[1], 1e-3), errors


@pytest.mark.parametrize("kind", ["jumprelu", "standard", "topk", "batchtopk"])
def test_everything_of_a_step_is_there_after_it(kind: str) -> None:
    theirs, ours = trainer_of(training_sae(kind)), trainer_of(training_sae(kind))
    accelerate(ours)
    steps(theirs, 5)
    steps(ours, 5)
    x = activations(99)
    step_input = TrainStepInput(
        sae_in=x, coefficients=ours.get_coefficients(), dead_neuron_mask=None, n_training_steps=5, is_logging_step=False
    )
    a, b = (trainer.sae.training_forward_pass(step_input=step_input) for trainer in (ours, theirs))
    assert close(a.hidden_pre, b.hidden_pre, 1e-5)
    assert a.metrics.keys() == b.metrics.keys()
    after = ours.step(x)
    assert close(after.feature_acts, b.feature_acts, 1e-5)
    assert close(after.sae_out, b.sae_out, 1e-5)
    assert torch.equal(after.feature_acts > 0, b.feature_acts > 0)
    assert int(after.feature_acts.nonzero().shape[0]) == int(after.feature_counts.sum())
    assert not after.feature_acts.requires_grad
    with pytest.raises(RuntimeError, match="hidden_pre: the weights have changed"):
        _ = after.hidden_pre
    log_keys = [trainer.build_train_step_log_dict(output, 5).keys() for trainer, output in ((ours, after), (theirs, b))]
    assert log_keys[0] == log_keys[1]


def test_a_dense_step_can_be_read_afterwards() -> None:
    trainer = trainer_of(training_sae("jumprelu"))
    trainer.sae.b_enc.data.fill_(0.1)
    accelerate(trainer)
    output = trainer.step(activations(0))
    assert float((output.feature_acts > 0).float().mean()) > 0.2  # no entries are kept there
    assert torch.equal((output.feature_acts > 0).sum(0), output.feature_counts)


def test_sparse_activations_stay_sparse() -> None:
    options = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}  # with it, theirs fails on a CPU
    theirs, ours = (trainer_of(training_sae("topk", **options)) for _ in range(2))
    accelerate(ours)
    assert_same_losses(steps(ours, 6), steps(theirs, 6))
    acts = ours.step(activations(7)).feature_acts
    assert acts.is_sparse
    assert close(acts.to_dense(), theirs.step(activations(7)).feature_acts.to_dense(), 1e-5)


def test_a_hook_in_training() -> None:
    theirs, ours = trainer_of(training_sae("topk")), trainer_of(training_sae("topk"))
    handle = accelerate(ours)
    seen = []
    ours.sae.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
    assert_same_losses(steps(ours, 5), steps(theirs, 5))
    assert len(seen) == 5
    assert handle.tally.left["training_forward_pass: a hook is attached to hook_sae_acts_post"] == 5
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)


def test_optimiser_goes_on_across_accelerate_and_undo() -> None:
    theirs, ours = trainer_of(training_sae("jumprelu")), trainer_of(training_sae("jumprelu"))
    expected = steps(theirs, 30)
    losses = steps(ours, 10)
    moment = ours.optimizer.state[ours.sae.W_enc]["exp_avg"]
    with accelerate(ours):
        assert ours.sae.W_enc.t().is_contiguous()
        assert ours.optimizer.state[ours.sae.W_enc]["exp_avg"].t().is_contiguous()
        assert torch.equal(ours.optimizer.state[ours.sae.W_enc]["exp_avg"], moment)
        losses += steps(ours, 10, start=10)
    assert ours.sae.W_enc.is_contiguous()
    assert ours.optimizer.state[ours.sae.W_enc]["exp_avg"].is_contiguous()
    losses += steps(ours, 10, start=20)
    assert_same_losses(losses, expected)
    assert_same_sae(ours.sae, theirs.sae)


@pytest.mark.filterwarnings("error:.*lr_scheduler")
@pytest.mark.parametrize("kind", ["jumprelu", "topk raw", "batchtopk"])
def test_fused_adam_in_the_middle_of_a_run(kind: str) -> None:
    options = {"lr_warm_up_steps": 4, "lr_decay_steps": 6}
    theirs, ours, at_once = (trainer_of(training_sae(kind, dtype="float64"), **options) for _ in range(3))
    expected = steps(theirs, 30)
    losses = steps(ours, 10)
    adam = ours.optimizer
    with accelerate(ours, optimizer=True) as handle:
        assert isinstance(ours.optimizer, FusedSAEAdam)
        assert "SAETrainer of sae-lens, with FusedSAEAdam" in handle.report()
        losses += steps(ours, 10, start=10)
        assert not handle.tally.left
    assert ours.optimizer is adam
    losses += steps(ours, 10, start=20)
    assert_same_losses(losses, expected, 1e-7)
    assert_same_sae(ours.sae, theirs.sae, 1e-6)
    assert ours.optimizer.param_groups[0].keys() == theirs.optimizer.param_groups[0].keys()
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]
    for p, q in zip(ours.sae.parameters(), theirs.sae.parameters(), strict=True):
        assert close(ours.optimizer.state[p]["exp_avg_sq"], theirs.optimizer.state[q]["exp_avg_sq"])
        assert ours.optimizer.state[p]["exp_avg"].is_contiguous()
        assert float(ours.optimizer.state[p]["step"]) == 30
    accelerate(at_once, optimizer=True)
    assert_same_losses(steps(at_once, 30), expected, 1e-7)


@pytest.mark.parametrize("kind", ["topk", "topk raw", "batchtopk"])
def test_fused_adam_sums_the_weight_gradients_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the choice is rescaled by decoder norms: no gradient of the weights' size is written."""
    trainer = trainer_of(training_sae(kind))
    accelerate(trainer, optimizer=True)
    seen: list[type] = []
    step = FusedSAEAdam.step

    def watched(self: Any, closure: Any = None) -> Any:
        seen.extend(type(p.grad) for p in self.matrices)
        return step(self, closure)

    monkeypatch.setattr(FusedSAEAdam, "step", watched)
    steps(trainer, 2)
    assert seen == [PendingGradient] * 4


LEFT: dict[str, tuple[str, dict[str, Any], str]] = {
    "layer norm": ("jumprelu", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
    "lp norm": ("standard", {"lp_norm": 0.5}, "lp_norm is not 1"),
    "fractional k": ("batchtopk", {"k": 20.5}, "k is no number of features"),
}


@pytest.mark.parametrize("case", LEFT)
def test_options_that_are_left_to_the_peer(case: str) -> None:
    kind, options, reason = LEFT[case]
    theirs, ours = (trainer_of(training_sae(kind, **options)) for _ in range(2))
    handle = accelerate(ours)
    n = 3  # before the auxiliary loss of a peer that has none for layer_norm
    assert_same_losses(steps(ours, n), steps(theirs, n), 0)
    assert handle.tally.left[f"training_forward_pass: {reason}"] == n
    assert not handle.tally.fused
    assert f"{n}  training_forward_pass: {reason}" in handle.report()


def test_rows_with_fewer_positives_than_k() -> None:
    for kind in ("topk", "batchtopk"):
        pair = [trainer_of(training_sae(kind, k=200)) for _ in range(2)]
        for trainer in pair:
            trainer.sae.b_enc.data.fill_(-2.0)
        accelerate(pair[0])
        losses = [steps(trainer, 10) for trainer in pair]
        assert_same_losses(*losses)
        assert torch.equal(pair[0].act_freq_scores, pair[1].act_freq_scores)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_sae(backend: str) -> None:
    theirs, ours = trainer_of(training_sae("jumprelu")), trainer_of(training_sae("jumprelu"))
    handle = accelerate(ours)
    ours.sae.training_forward_pass = torch.compile(ours.sae.training_forward_pass, backend=backend)
    assert_same_losses(steps(ours, 4), steps(theirs, 4))
    assert handle.tally.fused["training_forward_pass"] == 4
    sae = inference_sae("JumpReLU")
    expected = sae(activations(0))
    accelerate(sae)
    assert close(torch.compile(sae, backend=backend, fullgraph=True)(activations(0)), expected)


def test_several_saes_at_once() -> None:
    def multi() -> MultiSAETrainer:
        saes = {"a": training_sae("jumprelu"), "b": training_sae("topk")}
        config = SAETrainerConfig(
            total_training_samples=10 * N_TOKENS, train_batch_size_samples=N_TOKENS, lr_end=1e-4, lr=3e-4
        )
        data = iter([{"x": activations(i)} for i in range(20)])
        return MultiSAETrainer(config, saes, dict.fromkeys(saes, "x"), data)

    theirs, ours = multi(), multi()
    handle = accelerate(ours)
    theirs.fit()
    ours.fit()
    for name in ("a", "b"):
        assert_same_sae(ours.saes[name], theirs.saes[name])
    assert handle.tally.fused == {"training_forward_pass": 20, "_train_step": 20}


def test_layout_off_leaves_the_storage() -> None:
    theirs, ours = trainer_of(training_sae("jumprelu")), trainer_of(training_sae("jumprelu"))
    accelerate(ours, layout=False)
    assert_same_losses(steps(ours, 5), steps(theirs, 5))
    assert ours.sae.W_enc.is_contiguous()
