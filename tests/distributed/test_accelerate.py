"""SAEs of SAELens whose features two processes share, against SAELens' own that one process holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from saelens_problem import (
    D_SAE,
    N_TOKENS,
    TRAINED,
    MultiSAETrainer,
    SAETrainerConfig,
    TrainStepInput,
    activations,
    assert_same_losses,
    close,
    inference_sae,
    sae_lens,
    steps,
    trainer_of,
    training_sae,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

import fastsae
from fastsae.distributed import Groups

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


def shared_steps() -> dict[str, dict[str, Tensor]]:
    found = {}
    for kind in KINDS:
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


def in_two_processes() -> dict[str, Any]:
    return {"steps": shared_steps(), "inferred": all_inferred(), "several": several(distributed.group.WORLD)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found; they are started once, since importing SAELens takes most of their time."""
    return run(in_two_processes, 2, tmp_path_factory.mktemp("two"))


def test_a_step_is_that_of_the_whole_sae(ranks: list[dict[str, Any]]) -> None:
    for kind in KINDS:
        for amount, dead in DEAD.items():
            want = trained(training_sae(kind, dtype="float64"), dead)
            for rank in ranks:
                got = rank["steps"][f"{kind}, {amount}"]
                assert got.keys() == want.keys()
                for name, value in want.items():
                    rtol, atol = (
                        (1e-9, 1e-11) if value.dtype == torch.float64 else (1e-5, 1e-6)
                    )  # a threshold's gradient
                    text = f"{kind}, {amount}: {name}"
                    torch.testing.assert_close(
                        got[name], value, rtol=rtol, atol=atol, msg=lambda t, text=text: f"{text}: {t}"
                    )


RUNS = {
    "jumprelu tanh": True,
    "jumprelu": False,
    "standard": False,
    "topk": True,
    "batchtopk": False,
}  # with FusedSAEAdam?
N_STEPS = 6


def numbers(trainer: Any) -> dict[str, Tensor]:
    """Weights, moments and counts of a trainer, all whole."""
    found = {name: value.detach() for name, value in trainer.sae.state_dict().items()}
    names = dict(trainer.sae.named_parameters())
    state = {name: trainer.optimizer.state[p] for name, p in names.items()}
    found |= {f"{key} of {name}": value for name, of_p in state.items() for key, value in of_p.items()}
    counts = {"act_freq_scores": trainer.act_freq_scores, "passes": trainer.n_forward_passes_since_fired}
    return {name: value.clone().contiguous() for name, value in (found | counts).items()}


def logged(trainer: Any, seed: int) -> dict[str, float]:
    output = trainer.step(activations(seed))
    return dict(trainer.build_train_step_log_dict(output, n_training_samples=1))


def trained_by_trainer(kind: str, mesh: Any, optimizer: bool) -> dict[str, Any]:
    trainer = trainer_of(training_sae(kind, dtype="float64"))
    losses = steps(trainer, 1)  # moments that are there before
    if mesh is None:
        losses += steps(trainer, N_STEPS, start=1)
        log = logged(trainer, 99)
    else:
        with fastsae.accelerate(trainer, mesh=mesh, optimizer=optimizer) as handle:
            assert trainer.sae.W_dec.shape[0] < D_SAE
            losses += steps(trainer, N_STEPS, start=1)
            assert trainer.dead_neurons.shape == (D_SAE,)
            log = logged(trainer, 99)
        assert handle.tally.fused["training_forward_pass"] == N_STEPS + 1
        assert not handle.tally.left
        assert "this process has the features from" in handle.report()
    losses += steps(trainer, 1, start=50)  # by SAELens alone again
    return {"losses": losses, "log": log, "numbers": numbers(trainer)}


def trained_by_trainers() -> dict[str, Any]:
    return {kind: trained_by_trainer(kind, distributed.group.WORLD, optimizer) for kind, optimizer in RUNS.items()}


def test_a_trainer_goes_on_as_without_and_undo_gives_back_the_whole(tmp_path: Path) -> None:
    ranks = run(trained_by_trainers, 3, tmp_path)
    for kind in RUNS:
        want = trained_by_trainer(kind, None, False)
        for got in (rank[kind] for rank in ranks):
            assert_same_losses(got["losses"], want["losses"])
            for name, value in want["log"].items():
                assert got["log"][name] == pytest.approx(value, rel=1e-6, abs=1e-9), f"{kind}: {name}"
            assert got["numbers"].keys() == want["numbers"].keys()
            for name, value in want["numbers"].items():
                text = f"{kind}: {name}"
                torch.testing.assert_close(
                    got["numbers"][name], value, rtol=1e-5, atol=1e-7, msg=lambda t, text=text: f"{text}: {t}"
                )


def several(mesh: Any = None) -> dict[str, Tensor]:
    """Weights of two SAEs that one trainer of SAELens has trained to its end."""
    saes = {"a": training_sae("jumprelu quadratic"), "b": training_sae("topk")}
    config = SAETrainerConfig(total_training_samples=4 * N_TOKENS, train_batch_size_samples=N_TOKENS, lr_end=1e-4)
    trainer = MultiSAETrainer(config, saes, dict.fromkeys(saes, "x"), iter([{"x": activations(i)} for i in range(4)]))
    handle = None if mesh is None else fastsae.accelerate(trainer, mesh=mesh)
    trainer.fit()
    if handle is not None:
        assert all(len(sae.W_dec) < D_SAE for sae in saes.values())
        handle.undo()
    return {f"{key} of {name}": value for name, sae in saes.items() for key, value in sae.state_dict().items()}


def test_several_saes_are_shared_at_once(ranks: list[dict[str, Any]]) -> None:
    want = several()
    for got in (rank["several"] for rank in ranks):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert close(got[name], value, 2e-5), name


def inferred(name: str, mesh: Any) -> dict[str, Tensor]:
    sae = inference_sae(name, dtype="float64", **({"rescale_acts_by_decoder_norm": True} if name == "TopK" else {}))
    x = activations(5).double().reshape(2, -1, 64)
    handle = None if mesh is None else fastsae.accelerate(sae, mesh=mesh)
    with torch.no_grad():
        acts = sae.encode(x)
        edited = acts.clone()
        edited[..., 7] = 3.0  # a feature is steered
        found = {"encode": acts, "decode": sae.decode(acts), "edited": sae.decode(edited), "empty": sae.encode(x[:0])}
    x.requires_grad_()
    found["forward"] = sae(x)
    found["forward"].square().sum().backward()
    found["grad x"], found["grad b_dec"] = x.grad, sae.b_dec.grad.clone()
    if handle is not None:
        handle.undo()
    return {key: value.detach() for key, value in (found | dict(sae.named_parameters())).items()}


def all_inferred() -> dict[str, dict[str, Tensor]]:
    return {name: inferred(name, distributed.group.WORLD) for name in ("JumpReLU", "Standard", "TopK")}


def test_inference_is_that_of_the_whole_sae(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, got in rank["inferred"].items():
            for key, value in inferred(name, None).items():
                text = f"{name}: {key}"
                torch.testing.assert_close(
                    got[key], value, rtol=1e-9, atol=1e-11, msg=lambda t, text=text: f"{text}: {t}"
                )


def averaged() -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "feature"))
    found = {}
    for kind in ("jumprelu", "batchtopk"):
        sae = training_sae(kind, dtype="float64")
        with torch.no_grad():  # the first process that holds a part gives it to the others
            sae.b_dec += distributed.get_rank()
            sae.W_dec += mesh.get_local_rank("data")
        fastsae.accelerate(sae, mesh=mesh)
        sharding, whole = sae.sharding, step_input(sae, 0)
        whole.sae_in = whole.sae_in[:100] if sharding.data.rank == 0 else whole.sae_in[100:]
        sae.training_forward_pass(whole).loss.backward()
        sharding.average_gradients(sae.parameters(), len(whole.sae_in))
        norm = sharding.clip_grad_norm_(sae.named_parameters(), 1e-3)
        found[kind] = {name: sharding.whole(name, p.grad) for name, p in sae.named_parameters()} | {"norm": norm}
    return found


def test_processes_that_see_other_tokens_average_and_clip(tmp_path: Path) -> None:
    ranks = run(averaged, 4, tmp_path)
    for kind in ("jumprelu", "batchtopk"):
        sae = training_sae(kind, dtype="float64")
        sae.training_forward_pass(step_input(sae, 0)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), 1e-3)
        for rank in ranks:
            torch.testing.assert_close(rank[kind]["norm"], norm.double(), rtol=1e-7, atol=0)
            for name, p in sae.named_parameters():
                torch.testing.assert_close(rank[kind][name], p.grad, rtol=1e-5, atol=1e-10)


def refused(folder: str) -> int:
    world, rank = distributed.group.WORLD, distributed.get_rank()
    hooked, normalised = training_sae("jumprelu"), training_sae("jumprelu", normalize_activations="layer_norm")
    hooked.hook_sae_acts_post.register_forward_hook(lambda *_: None)
    twice = training_sae("topk")
    fastsae.accelerate(twice)
    matryoshka = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(d_in=4, d_sae=8, matryoshka_widths=[4, 8])
    other_p = training_sae("standard", lp_norm=0.5)
    before: list[tuple[Any, str]] = [
        (hooked, "a hook is attached to hook_sae_acts_post"),
        (normalised, "normalize_activations is 'layer_norm'"),
        ([training_sae("topk"), twice], "it is accelerated already"),
        (other_p, "lp_norm is not 1"),
        (training_sae("batchtopk", k=2.5), "k is no number of features"),
        (
            sae_lens.MatryoshkaBatchTopKTrainingSAE(matryoshka),
            "no class that accelerate",
        ),
        (sae_lens, "mesh: expected"),
        (trainer_of(training_sae("topk"), save_final_checkpoint=True), "save_final_checkpoint=False"),
        (training_sae("topk" if rank == 0 else "jumprelu"), "the same SAE and optimiser in every process"),
    ]
    trainer, two = trainer_of(training_sae("topk")), init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "feature"))
    with pytest.raises(fastsae.UsageError, match="no processes that see other tokens"):
        fastsae.accelerate(trainer, mesh=two)
    for obj, message in before:
        objects = obj if isinstance(obj, list) else [obj]
        classes = [type(item) for item in objects]
        with pytest.raises(fastsae.UsageError, match=message):
            fastsae.accelerate(obj, mesh=world)
        assert [type(item) for item in objects] == classes
        shapes = {item.W_dec.shape for item in objects if hasattr(item, "W_dec")}
        assert all(shape[0] in (8, D_SAE) for shape in shapes)
    with pytest.raises(Exception, match="could not share the SAE" if rank else "a hook"):
        fastsae.accelerate(training_sae("jumprelu") if rank else hooked, mesh=world)

    sae = training_sae("jumprelu")
    fastsae.accelerate(sae, mesh=world)
    other_tokens = step_input(sae, 0)
    other_tokens.sae_in = activations(rank)
    other_mask = replace(step_input(sae, 0), dead_neuron_mask=torch.ones(3, dtype=torch.bool))
    after: list[tuple[Any, str]] = [
        (lambda: sae.training_forward_pass(other_tokens), "the same tokens"),
        (
            lambda: sae.training_forward_pass(other_mask),
            "not of all features",
        ),
        (lambda: sae.training_forward_pass(step_input(sae, 0)).feature_acts, "feature_acts: expected"),
        (lambda: sae.training_forward_pass(step_input(sae, 0)).hidden_pre, "hidden_pre: expected"),
        (lambda: sae.encode(activations(3)), "under torch.no_grad"),
        (lambda: sae.encode_with_hidden_pre(activations(3)), "encode_with_hidden_pre: expected"),
        (lambda: sae.save_model(folder), "save_model: expected"),
        (lambda: sae.save_inference_model(folder), "save_inference_model: expected"),
        (lambda: fastsae.accelerate(sae, mesh=world), "accelerated already"),
    ]
    for call, message in after:
        with pytest.raises(fastsae.UsageError, match=message):
            call()
    sae.threshold.data[:] = -1.0 if rank else 1.0
    with torch.no_grad(), pytest.raises(fastsae.UsageError, match="a threshold is below 0"):
        sae.encode(activations(3))
    with pytest.raises(fastsae.UsageError, match=r"torch\.compile is around it"):
        torch.compile(sae.forward, backend="eager")(activations(3))
    handle = fastsae.accelerate(trainer, mesh=world)
    for method in (trainer.save_trainer_state, trainer.load_trainer_state):
        with pytest.raises(fastsae.UsageError, match="a checkpoint holds"):
            method(Path(folder))
    with pytest.raises(KeyError), handle:  # no process is waited for that knows of no error
        raise KeyError
    assert trainer.sae.W_dec.shape[0] < D_SAE
    handle.undo()
    assert trainer.sae.W_dec.shape[0] == D_SAE
    return len(before) + len(after)


def test_what_cannot_be_shared_is_refused_by_name(tmp_path: Path) -> None:
    first, second = run(refused, 2, tmp_path, str(tmp_path / "saved"))
    assert first == second == 18


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_one_process_computes_as_without_a_mesh(kind: str) -> None:
    sae, other = training_sae(kind), training_sae(kind)
    fastsae.accelerate(sae, mesh=Groups.alone())
    fastsae.accelerate(other)
    got, want = trained(sae, DEAD["many"]), trained(other, DEAD["many"])
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_other_peers_and_other_meshes_are_refused() -> None:
    with pytest.raises(fastsae.UsageError, match="mesh: expected a ProcessGroup"):
        fastsae.accelerate(training_sae("topk"), mesh="cpu")
    for package, peer in (("sparsify", "eai-sparsify"), ("dictionary_learning", "dictionary-learning")):
        of_package = type("Coder", (), {"__module__": f"{package}.coder"})()
        with pytest.raises(fastsae.UsageError, match=f"mesh: expected None for {peer}"):
            fastsae.accelerate(of_package, mesh=Groups.alone())
