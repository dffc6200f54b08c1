"""SAEs and trainers of the real SAELens, and how two of them are compared; skips where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install sae-lens)")

from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import TrainStepInput as TrainStepInput  # noqa: E402
from sae_lens.training.multi_sae_trainer import MultiSAETrainer as MultiSAETrainer  # noqa: E402
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
