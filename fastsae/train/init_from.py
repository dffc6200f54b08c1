"""Training that goes on from a saved SAE: which options follow from it, and how its weights become those of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsae.disk import digest
from fastsae.errors import FastsaeError, UsageError
from fastsae.sae import SparseAutoencoder, files, hub
from fastsae.train.config import OF_THE_SOURCE, TrainConfig
from fastsae.train.trainer import SAE_CLASSES

_ROUNDING = 1e-3  # of the length of a decoder row: that of weights in bf16


@dataclass(frozen=True)
class Source:
    """An SAE that training goes on from.

    Attributes:
        sae: In float32, on the CPU; it works on activations as the model gives them.
        files: Names and SHA-256 of the files that it was read from.
    """

    sae: SparseAutoencoder
    files: list[dict[str, str]]


def load_source(config: TrainConfig) -> Source:
    """Loads the SAE that `config.init_from` names, and checks that a run with these options can go on from it.

    Raises:
        UsageError: There is none, or an option contradicts it.
        FastsaeError: It is corrupt, or the hub could not be reached.
    """
    assert config.init_from is not None
    sae = _loaded(config.init_from)
    wanted = SAE_CLASSES[config.architecture]
    if not isinstance(sae, wanted) and config.architecture in sae.file_architectures:
        sae = _loaded(config.init_from, wanted)  # a BatchTopK SAE is a JumpReLU SAE, too
    if not isinstance(sae, wanted):
        raise _contradiction(config, "architecture", sae.architecture)
    for name, found in options_of(sae).items():
        own = getattr(config, name)
        if own is not None and own != found and name != "k":  # another k may be learnt
            raise _contradiction(config, name, found)
    weights = hub.located(config.init_from) / files.WEIGHTS_FILE
    if weights.is_file():
        known = [{"file": weights.name, "sha256": digest(weights)}]
    else:
        known = list(sae.metadata.get("provenance", {}).get("files", []))
    sae = sae.float()
    _agree_on_norms(sae, config)
    return Source(sae, known)


def _loaded(name: str, wanted: type[SparseAutoencoder] | None = None) -> SparseAutoencoder:
    try:
        return wanted.load(name, "cpu") if wanted else SparseAutoencoder.load(name, "cpu")
    except FileNotFoundError as error:
        raise UsageError(f"init_from: {error}") from None
    except ValueError as error:
        raise FastsaeError(f"init_from: {error}") from None


def _contradiction(config: TrainConfig, name: str, found: Any) -> UsageError:
    return UsageError(
        f"{name}: expected {found}, that of the SAE {config.init_from} which training goes on from, got "
        f"{getattr(config, name)}"
    )


def options_of(sae: SparseAutoencoder) -> dict[str, Any]:
    """The options of a run that follow from the SAE it goes on from."""
    architecture = next(name for name, cls in SAE_CLASSES.items() if isinstance(sae, cls))
    return {"architecture": architecture, **{name: getattr(sae, name) for name in OF_THE_SOURCE}}


def with_options_of(config: TrainConfig, sae: SparseAutoencoder) -> TrainConfig:
    """The options of a run, where open those of the SAE it goes on from."""
    found = {name: value for name, value in options_of(sae).items() if getattr(config, name) is None}
    return replace(config, **found)


def _agree_on_norms(sae: SparseAutoencoder, config: TrainConfig) -> None:
    """Makes decoder rows as long as the run keeps them, without changing what the SAE computes.

    Raises:
        UsageError: That is not possible.
    """
    is_unit = torch.allclose(sae.decoder_norms(), torch.ones(sae.d_sae), rtol=0, atol=_ROUNDING)
    stays_as_it_is = not config.normalize_decoder and getattr(sae, "rescale_acts_by_decoder_norm", True)
    if is_unit or stays_as_it_is:
        return
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError:
        raise UsageError(
            f"init_from: expected an SAE with decoder rows of length 1, got {config.init_from}, whose k largest activations "
            "would be others once they are normalised"
        ) from None
