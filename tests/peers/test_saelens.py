"""`accelerate` against the real SAELens: files, copies, the way back, and what is left alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saelens_problem import (
    D_IN,
    D_SAE,
    WIDTHS,
    SAETrainer,
    activations,
    assert_same_losses,
    assert_same_sae,
    close,
    inference_sae,
    sae_lens,
    steps,
    trainer_of,
    training_sae,
)

from fastsae import UsageError, accelerate
from fastsae.peers.handle import Handle


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
        assert llm_sae_training_runner.SAETrainer[Any, Any] is type(trainer)  # as annotations write it
        steps(trainer, 2)
        with torch.no_grad():
            assert close(loaded(activations(0)), theirs(activations(0)))
        assert handle.tally.fused == {"training_forward_pass": 2, "_train_step": 2, "forward": 1}
        assert "MatryoshkaBatchTopKTrainingSAE of sae-lens: no class" in handle.report()
    assert sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY["topk"][0] is plain
    assert llm_sae_training_runner.SAETrainer is SAETrainer


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
