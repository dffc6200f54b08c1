"""`accelerate` against the real SAELens: the same steps, hooks, files and copies, and the way back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FusedSAEAdam, UsageError, accelerate
from fastsae.peers.handle import Handle

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install sae-lens)")

from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import TrainStepInput  # noqa: E402
from sae_lens.training.multi_sae_trainer import MultiSAETrainer  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

D_IN, D_SAE, N_TOKENS, N_STEPS = 64, 512, 256, 50
WIDTHS = {"d_in": D_IN, "d_sae": D_SAE}
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "jumprelu": ("JumpReLU", {"l0_coefficient": 0.1}),
    "jumprelu quadratic": ("JumpReLU", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 40}),
    "jumprelu tanh": (
        "JumpReLU",
        {
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_tanh_scale": 2.0,
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 1e-2,
            "l0_coefficient": 0.1,
        },
    ),
    "standard": ("Standard", {"l1_coefficient": 0.3}),
    "topk": ("TopK", {"k": 20}),
    "topk raw": ("TopK", {"k": 20, "rescale_acts_by_decoder_norm": False}),
    "topk of the input": ("TopK", {"k": 20, "apply_b_dec_to_input": False}),
    "batchtopk": ("BatchTopK", {"k": 20}),
    "batchtopk raw": ("BatchTopK", {"k": 20, "rescale_acts_by_decoder_norm": False}),
}


def activations(seed: int, n: int = N_TOKENS) -> torch.Tensor:
    """Sparse mixtures of fixed directions, as a language model's activations are."""
    directions = torch.randn(96, D_IN, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, 96, generator=g) * (torch.rand(n, 96, generator=g) < 0.06)
    return weights @ directions + 0.05 * torch.randn(n, D_IN, generator=g) + 0.3


def training_sae(kind: str, **options: Any) -> Any:
    name, own = TRAINED[kind]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**WIDTHS, **{**own, **options})
    torch.manual_seed(0)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    with torch.no_grad():
        sae.W_dec.mul_(10 * (0.5 + torch.rand(D_SAE, 1)))  # norms that matter
        sae.b_dec.normal_(0, 0.1)
        if name in (
            "JumpReLU",
            "Standard",
        ):  # a twelfth of the features is active: fewer than where the dense path takes over
            hidden_pre = sae.process_sae_in(activations(1000)) @ sae.W_enc
            sae.b_enc.fill_(
                sae.cfg.to_dict().get("jumprelu_init_threshold", 0) - float(hidden_pre.float().quantile(0.94))
            )
        sae.b_enc[:30] -= 5  # dead from the start
    return sae


def trainer_of(sae: Any, cls: type = SAETrainer, **options: Any) -> Any:
    options = {"lr": 3e-4, "dead_feature_window": 3, **options}
    config = SAETrainerConfig(
        total_training_samples=N_TOKENS * N_STEPS, train_batch_size_samples=N_TOKENS, lr_end=1e-4, **options
    )
    return cls(config, sae, iter(()))


def steps(trainer: Any, n: int = N_STEPS, start: int = 0) -> list[dict[str, float]]:
    losses = []
    for i in range(start, start + n):
        output = trainer.step(activations(i))
        trainer.n_training_steps += 1
        losses.append({"loss": output.loss.item(), **{name: loss.item() for name, loss in output.losses.items()}})
    return losses


def inference_sae(name: str, **options: Any) -> Any:
    options = {"k": 20, **options} if name == "TopK" else options
    torch.manual_seed(0)
    sae = getattr(sae_lens, f"{name}SAE")(getattr(sae_lens, f"{name}SAEConfig")(**WIDTHS, **options))
    with torch.no_grad():
        sae.W_dec.mul_(0.5 + torch.rand(D_SAE, 1))
        sae.b_dec.normal_(0, 0.1)
        sae.b_enc.fill_(-float((sae.process_sae_in(activations(1000)) @ sae.W_enc).float().quantile(0.94)))
        if name == "JumpReLU":
            sae.threshold.uniform_(-0.2, 0.5)
    return sae


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max()))
    )


def assert_same_losses(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = 1e-6) -> None:
    assert [list(a) for a in ours] == [list(b) for b in theirs]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in a:
            assert abs(a[name] - b[name]) <= tolerance * max(1.0, abs(b["loss"])), (i, name, a[name], b[name])


def assert_same_sae(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    for name, value in theirs.state_dict().items():
        assert close(ours.state_dict()[name], value, tolerance), name


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


@pytest.mark.parametrize("name", ["JumpReLU", "Standard", "TopK"])
@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("shape", [(N_TOKENS,), (4, 8), ()], ids=str)
def test_inference(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    theirs, ours = inference_sae(name, **options), inference_sae(name, **options)
    handle = accelerate(ours)
    x = activations(0)[: max(1, torch.Size(shape).numel())].reshape(*shape, D_IN)
    with torch.no_grad():
        acts, dense = ours.encode(x), theirs.encode(x)
        pairs = [(acts, dense), (ours.decode(acts), theirs.decode(dense)), (ours(x), theirs(x))]
    for a, b in pairs:
        if "dtype" in options:  # a gate within rounding of 8 bits may open in one of them alone
            assert a.dtype == b.dtype == torch.bfloat16
            assert float((a - b).float().norm()) <= 0.05 * float(b.float().norm())
        else:
            assert close(a, b, 2e-6)
    assert handle.tally.fused == {"encode": 1, "decode": 1, "forward": 1}, handle.report()


def test_rescaled_inference() -> None:
    theirs, ours = (inference_sae("TopK", rescale_acts_by_decoder_norm=True) for _ in range(2))
    handle = accelerate(ours)
    x = activations(0)
    with torch.no_grad():
        acts, dense = ours.encode(x), theirs.encode(x)
        assert close(acts, dense)
        for _ in range(2):  # decode leaves what it remembers as it is
            assert close(ours.decode(acts), theirs.decode(dense))
    assert not handle.tally.left


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda acts: acts.__setitem__((0, 3), 2.0),
    "one less": lambda acts: acts.masked_fill_(acts == acts.max(), 0),
    "through .data": lambda acts: acts.data.mul_(2),
    "through NumPy": lambda acts: acts.numpy().__setitem__((slice(None), 7), 1.0),
    "moved": lambda acts: acts.copy_(acts.roll(1, 1)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_edited_activations_are_honoured(edit: str, mode: Any) -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    with mode():
        acts = ours.encode(activations(0))
        EDITS[edit](acts)
        assert close(ours.decode(acts), theirs.decode(acts))
    assert handle.tally.left == {"decode: the activations are not encode's own, or were edited": 1}


def test_activations_are_saved_and_copied_without_their_entries(tmp_path: Path) -> None:
    sae = inference_sae("JumpReLU")
    accelerate(sae)
    with torch.no_grad():
        acts = sae.encode(activations(0))
    torch.save(acts, tmp_path / "acts.pt")
    assert torch.equal(torch.load(tmp_path / "acts.pt"), acts)  # weights_only
    assert torch.equal(copy.deepcopy(acts), acts)


@pytest.mark.parametrize("name", ["JumpReLU", "TopK"])
def test_gradients_of_inference(name: str) -> None:
    theirs, ours = inference_sae(name), inference_sae(name)
    handle = accelerate(ours)
    for use in (lambda sae, x: sae(x), lambda sae, x: sae.decode(sae.encode(x))):
        grads = []
        for sae in (theirs, ours):
            x = activations(0).requires_grad_()
            use(sae, x).pow(2).sum().backward()
            grads.append([x.grad, *(p.grad for p in sae.parameters())])
            sae.zero_grad()
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or close(b, a, 1e-5)
    assert handle.tally.fused == {"forward": 1}


def test_nan_and_a_wrong_shape_are_the_peers_own(tmp_path: Path) -> None:
    for name in ("JumpReLU", "TopK"):
        theirs, ours = inference_sae(name), inference_sae(name)
        accelerate(ours)
        x = activations(0)
        x[3, 5] = float("nan")
        with torch.no_grad():
            for call in ("encode", "forward"):
                assert torch.equal(getattr(ours, call)(x).isnan(), getattr(theirs, call)(x).isnan())
        with pytest.raises(RuntimeError):  # theirs, of a matrix product
            ours(torch.zeros(3, D_IN + 1))


def test_hooks_that_are_attached_afterwards() -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    x = activations(0)
    with torch.no_grad():
        caches = [sae.run_with_cache(x) for sae in (theirs, ours)]
        assert caches[0][1].keys() == caches[1][1].keys()
        assert len(caches[0][1]) >= 4
        for name, value in caches[0][1].items():
            assert close(caches[1][1][name], value)
        double = [("hook_sae_acts_post", lambda acts, hook: 2 * acts)]
        assert close(*[sae.run_with_hooks(x, fwd_hooks=double) for sae in (ours, theirs)])
    assert any("a hook is attached to hook_sae" in reason for reason in handle.tally.left)
    with torch.no_grad():
        ours(x)
    assert handle.tally.fused["forward"] == 1  # they are gone again


def test_a_hook_in_training() -> None:
    theirs, ours = trainer_of(training_sae("topk")), trainer_of(training_sae("topk"))
    handle = accelerate(ours)
    seen = []
    ours.sae.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
    assert_same_losses(steps(ours, 5), steps(theirs, 5))
    assert len(seen) == 5
    assert handle.tally.left["training_forward_pass: a hook is attached to hook_sae_acts_post"] == 5
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)


def test_transforms_of_torch_func() -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    x = activations(0)[:8]
    for transform in (lambda sae: torch.func.vmap(sae), lambda sae: torch.func.grad(lambda x: sae(x).sum())):
        assert close(transform(ours)(x), transform(theirs)(x), 1e-5)
    assert not handle.tally.fused


def test_saes_in_a_transformer() -> None:
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(n_layers=1, d_model=D_IN, n_ctx=16, d_head=16, d_vocab=50, act_fn="gelu", seed=0)
    model = sae_lens.HookedSAETransformer(config)
    sae = inference_sae("JumpReLU")
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        outputs = []
        x = model.run_with_cache(tokens)[1]["blocks.0.hook_resid_post"]
        sae.b_enc.fill_(-float((sae.process_sae_in(x) @ sae.W_enc).quantile(0.94)))
        for use_error_term in (False, True):
            model.add_sae(sae, use_error_term=use_error_term)
            theirs, their_cache = model.run_with_cache(tokens)
            handle = accelerate(model)
            outputs.append(model(tokens))
            ours, our_cache = model.run_with_cache(tokens)
            assert close(ours, theirs, 1e-5)
            assert close(outputs[-1], theirs, 1e-5)
            assert our_cache.keys() == their_cache.keys()
            assert handle.tally.fused["encode"] == handle.tally.fused["decode"] > 0
            assert any("a hook is attached" in reason for reason in handle.tally.left)
            handle.undo()


@pytest.mark.filterwarnings("ignore:Setting use_error_term")
def test_error_term() -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    for sae in (theirs, ours):
        sae.use_error_term = True
    x = activations(0)
    assert close(ours(x), theirs(x))
    assert close(ours(x), x)
    grads = [torch.autograd.grad(sae(x).sum(), sae.W_dec)[0] for sae in (ours, theirs)]
    assert close(*grads, 1e-5)
    assert handle.tally.fused["forward"] == 3


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_files_under_every_path(kind: str, tmp_path: Path) -> None:
    theirs, ours = trainer_of(training_sae(kind)), trainer_of(training_sae(kind))
    accelerate(ours)
    steps(theirs, 3)
    steps(ours, 3)
    for name, trainer in (("theirs", theirs), ("ours", ours)):
        trainer.sae.save_model(str(tmp_path / name / "model"))
        trainer.sae.save_inference_model(str(tmp_path / name / "inference"))
        trainer.save_checkpoint("checkpoint", base_path=tmp_path / name)
    for folder in ("model", "inference", "checkpoint"):
        configs = [json.loads((tmp_path / name / folder / "cfg.json").read_text()) for name in ("ours", "theirs")]
        assert configs[0] == configs[1]
    x = activations(9)
    with torch.no_grad():
        saes = [sae_lens.SAE.load_from_disk(str(tmp_path / name / "inference")) for name in ("ours", "theirs")]
        assert close(*[sae(x) for sae in saes], 1e-4)
    loaded = type(theirs.sae).load_from_disk(str(tmp_path / "ours" / "model"))
    for name, value in ours.sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.dtype)), name
    again = trainer_of(training_sae(kind))  # the peer goes on from our checkpoint
    again.sae.load_weights_from_checkpoint(tmp_path / "ours" / "checkpoint")
    again.load_trainer_state(tmp_path / "ours" / "checkpoint")
    assert_same_losses(steps(again, 5, start=3), steps(ours, 5, start=3))


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


def test_undo_twice_and_accelerate_twice() -> None:
    trainer = trainer_of(training_sae("topk"))
    parameters = [id(p) for p in trainer.sae.parameters()]
    classes = type(trainer), type(trainer.sae)
    handle = accelerate(trainer)
    assert isinstance(trainer, classes[0])
    assert isinstance(trainer.sae, classes[1])
    second = accelerate(trainer)
    assert not second.changes
    assert "accelerated already" in second.report()
    second.undo()
    assert (type(trainer), type(trainer.sae)) != classes
    handle.undo()
    handle.undo()
    assert (type(trainer), type(trainer.sae)) == classes
    assert "_fastsae" not in trainer.__dict__
    assert "_fastsae" not in trainer.sae.__dict__
    assert [id(p) for p in trainer.sae.parameters()] == parameters
    with accelerate(trainer.sae) as handle:
        assert type(trainer.sae) is not classes[1]
    assert type(trainer.sae) is classes[1]


def test_a_copy_lives_its_own_life() -> None:
    sae = training_sae("jumprelu")
    handle = accelerate(sae)
    trainer = trainer_of(copy.deepcopy(sae))
    steps(trainer, 3)
    assert not close(trainer.sae.W_enc, sae.W_enc)
    handle.undo()
    theirs = trainer_of(training_sae("jumprelu"))
    steps(theirs, 3)
    assert_same_sae(trainer.sae, theirs.sae)


def test_a_users_subclass_is_left_alone_and_named() -> None:
    class Mine(sae_lens.TopKTrainingSAE):
        def calculate_aux_loss(self, **inputs: Any) -> dict[str, torch.Tensor]:
            return {"mine": inputs["feature_acts"].sum()}

    sae = Mine(sae_lens.TopKTrainingSAEConfig(**WIDTHS, k=4))
    trainer = trainer_of(sae)
    handle = accelerate(trainer)
    assert type(sae) is Mine
    assert type(trainer) is SAETrainer
    assert "Mine of sae-lens: no class that accelerate() knows" in handle.report()
    assert "SAETrainer of sae-lens: its SAE is left alone" in handle.report()

    class MyTrainer(SAETrainer):
        pass

    trainer = trainer_of(training_sae("topk"), cls=MyTrainer)
    handle = accelerate(trainer)
    assert type(trainer) is MyTrainer
    assert isinstance(trainer.sae, sae_lens.TopKTrainingSAE)
    steps(trainer, 2)
    assert handle.tally.fused == {"training_forward_pass": 2}


@pytest.mark.parametrize("name", ["Gated", "MatryoshkaBatchTopK"])
def test_other_architectures_are_named(name: str) -> None:
    options = {"k": 8, "matryoshka_widths": [64, D_SAE]} if name != "Gated" else {}
    sae = getattr(sae_lens, f"{name}TrainingSAE")(getattr(sae_lens, f"{name}TrainingSAEConfig")(**WIDTHS, **options))
    handle = accelerate([sae, training_sae("topk")])
    assert len(handle.changes) == 1
    assert f"{name}TrainingSAE of sae-lens: no class" in handle.report()


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


def test_what_is_replaced_on_the_object_is_called() -> None:
    sae = inference_sae("JumpReLU")
    handle = accelerate(sae)
    sae.process_sae_in = lambda x: x * 0
    sae.b_enc.data.fill_(1.0)
    with torch.no_grad():
        assert (sae(activations(0)) - sae(activations(1))).abs().max() == 0
    assert "forward: process_sae_in is replaced on the object" in handle.tally.left
    del sae.process_sae_in
    sae.activation_fn = torch.nn.GELU()
    with torch.no_grad():
        sae.encode(activations(0))
    assert "encode: activation_fn is not the architecture's own" in handle.tally.left


def test_rows_with_fewer_positives_than_k() -> None:
    for kind in ("topk", "batchtopk"):
        pair = [trainer_of(training_sae(kind, k=200)) for _ in range(2)]
        for trainer in pair:
            trainer.sae.b_enc.data.fill_(-2.0)
        accelerate(pair[0])
        losses = [steps(trainer, 10) for trainer in pair]
        assert_same_losses(*losses)
        assert torch.equal(pair[0].act_freq_scores, pair[1].act_freq_scores)


def test_compile_sae() -> None:
    theirs, ours = trainer_of(training_sae("jumprelu")), trainer_of(training_sae("jumprelu"))
    handle = accelerate(ours)
    ours.sae.training_forward_pass = torch.compile(ours.sae.training_forward_pass, backend="aot_eager")
    assert_same_losses(steps(ours, 4), steps(theirs, 4))
    assert handle.tally.fused["training_forward_pass"] == 4
    sae = inference_sae("JumpReLU")
    expected = sae(activations(0))
    accelerate(sae)
    assert close(torch.compile(sae, backend="aot_eager", fullgraph=True)(activations(0)), expected)


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


def test_everything_that_the_package_makes(tmp_path: Path) -> None:
    theirs = inference_sae("JumpReLU")
    theirs.save_model(str(tmp_path))
    plain = sae_lens.TopKTrainingSAE
    with accelerate(sae_lens) as handle:
        config = sae_lens.TopKTrainingSAEConfig(**WIDTHS, k=20)
        sae = sae_lens.TrainingSAE.from_dict(config.to_dict())
        assert isinstance(sae, plain)
        assert type(sae) is not plain
        assert sae.W_enc.t().is_contiguous()
        loaded = sae_lens.SAE.load_from_disk(str(tmp_path))
        assert loaded.W_enc.t().is_contiguous()
        assert loaded.W_enc.shape == (D_IN, D_SAE)
        from sae_lens import llm_sae_training_runner

        trainer = trainer_of(sae, cls=llm_sae_training_runner.SAETrainer)
        steps(trainer, 2)
        with torch.no_grad():
            assert close(loaded(activations(0)), theirs(activations(0)))
        assert handle.tally.fused == {"training_forward_pass": 2, "_train_step": 2, "forward": 1}
        assert "MatryoshkaBatchTopKTrainingSAE of sae-lens: no class" in handle.report()
    assert sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY["topk"][0] is plain
    assert llm_sae_training_runner.SAETrainer is SAETrainer


def test_layout_off_leaves_the_storage() -> None:
    theirs, ours = trainer_of(training_sae("jumprelu")), trainer_of(training_sae("jumprelu"))
    accelerate(ours, layout=False)
    assert_same_losses(steps(ours, 5), steps(theirs, 5))
    assert ours.sae.W_enc.is_contiguous()


def test_what_cannot_be_accelerated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"obj: expected an object of sae-lens, .* got torch\.nn\.modules\.linear\.Linear"
    ):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="obj: expected an object of a peer, got none"):
        accelerate([])
    sae = training_sae("topk")
    with pytest.raises(UsageError, match="optimizer: expected False"):
        accelerate(sae, optimizer=True)
    with pytest.raises(UsageError, match="obj: expected an object of"):
        accelerate([sae, torch.nn.Linear(2, 2)])
    assert type(sae) is sae_lens.TopKTrainingSAE  # all or nothing
    with pytest.raises(UsageError, match="expected an SAE or a trainer of sae-lens, got TopKTrainingSAEConfig"):
        accelerate(sae.cfg)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "6.6")
    with pytest.raises(UsageError, match=r"sae-lens: expected version 6\.54, .* got 6\.6"):
        accelerate(sae)


def test_the_handle_reads_well() -> None:
    trainer = trainer_of(training_sae("jumprelu"))
    handle = accelerate(trainer)
    assert isinstance(handle, Handle)
    assert handle.accelerated is trainer
    steps(trainer, 2)
    assert repr(handle) == "<fastsae.accelerate: 2 accelerated; 4 calls fused, 0 left to the peer>"
    assert handle.report().splitlines() == [
        "accelerated",
        "  JumpReLUTrainingSAE of sae-lens, with W_enc stored feature by feature",
        "  SAETrainer of sae-lens",
        "calls on the fused ops",
        "          2  training_forward_pass",
        "          2  _train_step",
    ]
    assert LoggingConfig  # imported for the trainers that log
