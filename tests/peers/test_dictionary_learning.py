"""`accelerate` against the real dictionary_learning: fifty steps of each trainer, its thresholds, counts and dictionaries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import UsageError, accelerate

pytest.importorskip(
    "dictionary_learning", reason="dictionary-learning is not installed (pip install dictionary-learning)"
)

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE

D_IN, D_SAE, N_TOKENS, N_STEPS = 64, 512, 256, 50
TRAINERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "topk": (TopKTrainer, {"k": 20, "lr": 1e-3, "threshold_start_step": 5}),
    "batchtopk": (BatchTopKTrainer, {"k": 20, "lr": 1e-3, "threshold_start_step": 5}),
    "jumprelu": (JumpReluTrainer, {"bandwidth": 0.1, "lr": 1e-3, "sparsity_warmup_steps": 10}),
    "jumprelu defaults": (JumpReluTrainer, {"sparsity_warmup_steps": 10}),
}


def activations(seed: int, n: int = N_TOKENS) -> torch.Tensor:
    directions = torch.randn(96, D_IN, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, 96, generator=g) * (torch.rand(n, 96, generator=g) < 0.06)
    return weights @ directions + 0.05 * torch.randn(n, D_IN, generator=g) + 0.3


def config(kind: str) -> dict[str, Any]:
    _, options = TRAINERS[kind]
    sizes = {"activation_dim": D_IN, "dict_size": D_SAE, "layer": 0, "lm_name": "none", "device": "cpu", "seed": 0}
    return {"steps": N_STEPS, "warmup_steps": 5, **sizes, **options}


def trainer_of(kind: str, *, threshold: float = 0.04, dead_after: int = N_TOKENS, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    trainer = TRAINERS[kind][0](**config(kind))
    if "jumprelu" in kind and "defaults" not in kind:
        trainer.ae.threshold.data.fill_(threshold)
    if "topk" in kind:
        trainer.ae.encoder.bias.data[:30] = -5  # dead from the start
    trainer.dead_feature_threshold = dead_after
    trainer.ae.to(dtype)
    return trainer


def steps(trainer: Any, n: int = N_STEPS, start: int = 0) -> list[float]:
    dtype = next(trainer.ae.parameters()).dtype
    return [trainer.update(i, activations(i).to(dtype)) for i in range(start, start + n)]


def assert_same(ours: Any, theirs: Any, losses: tuple[list[float], list[float]], tolerance: float = 1e-6) -> None:
    for i, (a, b) in enumerate(zip(*losses, strict=True)):
        assert abs(a - b) <= tolerance * max(1.0, abs(b)), (i, a, b)
    for name, value in theirs.ae.state_dict().items():
        torch.testing.assert_close(
            ours.ae.state_dict()[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(ours.num_tokens_since_fired, theirs.num_tokens_since_fired)
    assert ours.get_logging_parameters().keys() == theirs.get_logging_parameters().keys()
    assert ours.dead_features == theirs.dead_features


@pytest.mark.parametrize("kind", TRAINERS)
def test_fifty_steps_of_the_trainer(kind: str) -> None:
    """In fp64: within rounding of fp32 an activation lies now and then on the other side of a gate, and the runs part."""
    for dtype, n, tolerance in ((torch.float64, N_STEPS, 1e-7), (torch.float32, 8, 1e-6)):
        theirs, ours = trainer_of(kind, dtype=dtype), trainer_of(kind, dtype=dtype)
        handle = accelerate(ours)
        assert_same(ours, theirs, (steps(ours, n), steps(theirs, n)), tolerance)
        assert handle.tally.fused == {"loss": n}
    assert not handle.tally.left
    if "jumprelu" not in kind:
        assert ours.dead_features > 0  # the auxiliary loss ran
        assert float(ours.ae.threshold) > 0


@pytest.mark.parametrize("threshold", [0.001, 0.02, 0.06])
def test_thresholds_beside_half_a_bandwidth(threshold: float) -> None:
    """With a threshold below half the bandwidth every inactive feature counts in their estimate."""
    theirs, ours = trainer_of("jumprelu", threshold=threshold), trainer_of("jumprelu", threshold=threshold)
    accelerate(ours)
    for trainer in (theirs, ours):
        trainer.loss(activations(0), step=20).backward()
    for name, p in theirs.ae.named_parameters():
        mine = dict(ours.ae.named_parameters())[name].grad
        assert float((mine - p.grad).abs().max()) <= 2e-6 * float(p.grad.abs().max()), name
    assert float(theirs.ae.threshold.grad.abs().max()) > 0


def test_a_dense_step_has_their_gradient() -> None:
    theirs, ours = trainer_of("jumprelu", threshold=0.0), trainer_of("jumprelu", threshold=0.0)
    for trainer in (theirs, ours):
        trainer.ae.b_enc.data.fill_(0.3)
    accelerate(ours)
    for trainer in (theirs, ours):
        trainer.loss(activations(0), step=20).backward()
    for name, p in theirs.ae.named_parameters():
        mine = dict(ours.ae.named_parameters())[name].grad
        assert float((mine - p.grad).abs().max()) <= 3e-6 * float(p.grad.abs().max()), name


def test_negative_thresholds_are_left_to_the_peer() -> None:
    theirs, ours = trainer_of("jumprelu", threshold=-0.01), trainer_of("jumprelu", threshold=-0.01)
    handle = accelerate(ours)
    losses = [float(trainer.loss(activations(0), step=20)) for trainer in (theirs, ours)]
    assert losses[0] == losses[1]
    assert handle.tally.left == {"loss: a threshold is below 0": 1}


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_rows_with_fewer_positives_than_k(kind: str) -> None:
    theirs, ours = trainer_of(kind), trainer_of(kind)
    handle = accelerate(ours)
    x = activations(0)
    x[:5] = 0
    for trainer in (theirs, ours):
        trainer.ae.encoder.bias.data.fill_(-0.3)
        trainer.loss(x, step=10).backward()
    for name, p in theirs.ae.named_parameters():
        torch.testing.assert_close(dict(ours.ae.named_parameters())[name].grad, p.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.ae.threshold, theirs.ae.threshold)
    assert ("rows with other gradients" in handle.report()) == (kind == "topk")


def test_logging_runs_their_own_code() -> None:
    theirs, ours = trainer_of("topk"), trainer_of("topk")
    handle = accelerate(ours)
    logs = [trainer.loss(activations(0), step=10, logging=True) for trainer in (ours, theirs)]
    assert torch.equal(logs[0].f, logs[1].f)
    assert logs[0].losses == logs[1].losses
    assert handle.tally.left == {"loss: logging wants the dense activations": 1}


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu defaults"])
def test_train_sae_with_a_class(kind: str, tmp_path: Path) -> None:
    cls = TRAINERS[kind][0]
    with accelerate(cls) as handle:
        made = handle.accelerated
        assert issubclass(made, cls)
        n = 8
        data = [activations(i) for i in range(n + 1)]
        for name, trainer in (("theirs", cls), ("ours", made)):
            torch.manual_seed(0)
            trainSAE(data, [{"trainer": trainer, **config(kind)}], n, save_dir=str(tmp_path / name), device="cpu")
        assert handle.tally.fused == {"loss": n}
    files = [torch.load(tmp_path / name / "trainer_0" / "ae.pt") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    for name, value in files[1].items():
        torch.testing.assert_close(files[0][name], value, rtol=0, atol=2e-5)
    assert (tmp_path / "ours/trainer_0/config.json").read_text() == (
        tmp_path / "theirs/trainer_0/config.json"
    ).read_text()


def test_storage_and_optimiser_across_accelerate_and_undo() -> None:
    theirs, ours = (trainer_of("topk", dead_after=10**9) for _ in range(2))  # an auxiliary loss cannot be copied
    losses = steps(ours, 10)
    before = copy.deepcopy(ours.optimizer.state_dict())
    handle = accelerate(ours)
    weight = ours.ae.decoder.weight
    assert weight.t().is_contiguous()
    assert ours.optimizer.state[weight]["exp_avg"].t().is_contiguous()
    for index, state in ours.optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], before["state"][index]["exp_avg"])
    losses += steps(ours, 10, start=10)
    copied = copy.deepcopy(ours)
    handle.undo()
    handle.undo()
    assert type(ours) is TopKTrainer
    assert ours.ae.decoder.weight.is_contiguous()
    losses += steps(ours, 10, start=20)
    assert_same(ours, theirs, (losses, steps(theirs, 30)))
    steps(copied, 10, start=20)
    assert_same(copied, theirs, (losses[20:], losses[20:]))


@pytest.mark.parametrize("shape", [(N_TOKENS,), (4, 8)], ids=str)
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_dictionaries(kind: str, shape: tuple[int, ...]) -> None:
    trainer = trainer_of(kind, threshold=0.2)
    steps(trainer, 10)
    theirs = trainer.ae
    if kind == "jumprelu":
        theirs.b_enc.data.sub_(2.0)
    ours = copy.deepcopy(theirs)
    handle = accelerate(ours)
    x = activations(3)[: torch.Size(shape).numel()].reshape(*shape, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=0, atol=2e-6)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-5)
        edited = ours.encode(x)
        edited[..., 3] = 2.0
        torch.testing.assert_close(ours.decode(edited), theirs.decode(edited))
        for a, b in zip(ours(x, output_features=True), theirs(x, output_features=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    assert handle.tally.fused == {"encode": 4, "decode": 2}
    assert handle.tally.left == {"decode: the activations are not encode's own, or were edited": 1}
    grads = []
    for ae in (ours, theirs):
        ae(x).pow(2).sum().backward()
        grads.append([p.grad for p in ae.parameters()])
        ae.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)  # where gradients are asked for the peer's code runs
    handle.undo()
    assert type(ours) is type(theirs)


def test_a_batch_is_chosen_from_at_once() -> None:
    theirs = trainer_of("batchtopk").ae
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    with torch.no_grad():
        acts = [ae.encode(activations(0), use_threshold=False) for ae in (ours, theirs)]
    torch.testing.assert_close(*acts, rtol=0, atol=2e-6)


def test_a_hook_on_the_dictionary() -> None:
    theirs, ours = trainer_of("topk"), trainer_of("topk")
    handle = accelerate(ours)
    seen = []
    ours.ae.encoder.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    assert_same(ours, theirs, (steps(ours, 5), steps(theirs, 5)))
    assert len(seen) == 5
    assert handle.tally.left == {"loss: a hook is attached to the dictionary": 5}


def test_what_is_not_known_is_left_alone_and_named() -> None:
    class Mine(TopKTrainer):
        pass

    torch.manual_seed(0)
    mine = Mine(**config("topk"))
    torch.manual_seed(0)
    matryoshka = MatryoshkaBatchTopKTrainer(**config("topk"), group_fractions=[0.5, 0.5])
    handle = accelerate([mine, matryoshka, trainer_of("topk")])
    assert type(mine) is Mine
    assert "Mine of dictionary-learning: no class that accelerate() knows" in handle.report()
    assert "MatryoshkaBatchTopKTrainer of dictionary-learning: no class" in handle.report()
    again = accelerate(handle.accelerated[2])
    assert "TopKTrainer of dictionary-learning: it is accelerated already" in again.report()
    with pytest.raises(UsageError, match="optimizer: expected False"):
        accelerate(trainer_of("topk"), optimizer=True)
