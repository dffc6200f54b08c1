"""What an SAE's gradients say of its training: signal-to-noise ratios and leakage on the held-out dialogues of a pipeline."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from fastsae.data.activations import position_limit
from fastsae.errors import FastsaeError
from fastsae.evaluate.gsnr import gsnr
from fastsae.evaluate.leakage import leakage
from fastsae.fields import Fields
from fastsae.sae import FusedReLUSAE, SparseAutoencoder
from fastsae.sae.token_gradients import SparsityTerm
from fastsae.train.config import TrainConfig
from fastsae.train.pipeline import Pipeline

Measure = Literal["gsnr", "leakage"]
_TANH_SCALE = 4.0  # that of training


def sparsity_term(sae: SparseAutoencoder, config: TrainConfig) -> SparsityTerm:
    """The sparsity term at the end of a training run, in the units of the saved SAE.

    Its weight is in the metadata of SAEs that this library has trained; of others the reconstruction alone counts.

    Raises:
        FastsaeError: The metadata hold another thing than a number.
    """
    saved = Fields(sae.metadata, "metadata.")
    try:
        scale = saved.number("activation_scale", 0, above=True, default=1.0)
        coefficient = saved.number("sparsity_coefficient", 0, default=0.0)
    except ValueError as error:
        raise FastsaeError(str(error)) from None
    # trained on scale * x, the squared error is scale^2 times that on x; an L1 penalty is scale times, L0 is the same
    power = 1 if isinstance(sae, FusedReLUSAE) else 2
    return SparsityTerm(coefficient / scale**power, config.sparsity, config.target_l0, _TANH_SCALE * scale)


def measure_gradients(
    sae: SparseAutoencoder,
    pipeline: Pipeline,
    measures: Collection[Measure],
    term: SparsityTerm | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures GSNR, leakage or both on the held-out dialogues; the blocks of leakage are those of `config.block_length`.

    Args:
        sae: The SAE, on the device of the model.
        pipeline: Model and data.
        measures: What to measure.
        term: The sparsity term of the loss; None for the one in the metadata of the SAE.
        progress: Show progress bars.

    Returns:
        By measure what `fastsae.evaluate.gsnr.gsnr` and `fastsae.evaluate.leakage.leakage` return.

    Raises:
        UsageError: The held-out dialogues fill no block.
    """
    config, residual = pipeline.config, pipeline.residual
    term = sparsity_term(sae, config) if term is None else term
    options: dict[str, Any] = {
        "max_norm_multiple": pipeline.max_norm_multiple,
        "progress": progress,
    }
    found: dict[str, Any] = {}
    if "gsnr" in measures:
        batches, n = pipeline.held_out_batches(), len(pipeline.held_out)
        found["gsnr"] = gsnr(sae, residual, batches, term, seed=config.seed, n_dialogues=n, **options)
    if "leakage" in measures:
        length = min(config.block_length, position_limit(residual.model) or config.block_length)
        options |= {"max_length": pipeline.max_length, "batch_tokens": config.forward_tokens, "block_length": length}
        data = pipeline.dialogues, pipeline.held_out, pipeline.tokenizer
        found["leakage"] = leakage(sae, residual, *data, term, **options)
    return found
