"""The SAE that a command is given: a folder of ours, another library's, or one on the hub, and the data that belong to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastsae.errors import UsageError
from fastsae.train.config import TrainConfig

DATA_OPTIONS = (
    "model dataset split layer hook model_dtype max_length max_dialogues dedup_words eval_dialogues max_norm_multiple "
    "forward_tokens device seed"
).split()
"""Options that say which data belong to an SAE, and how the model reads them."""

if TYPE_CHECKING:
    from fastsae.sae import SparseAutoencoder


def saved_sae(name: str, given: dict[str, Any]) -> tuple[SparseAutoencoder, TrainConfig]:
    """Loads an SAE, with the options of its run or, where the folder has none, those that are given.

    Args:
        name: A folder or hub id.
        given: Options of the command line, which replace those of the run.

    Raises:
        UsageError: There is no SAE, or nothing says which model, data or layer belongs to it.
    """
    from fastsae.data.hooks import place_of
    from fastsae.peers import formats
    from fastsae.train.evaluation import load_sae
    from fastsae.train.folder import CONFIG_FILE, read_config

    folder = formats.find(name, formats.wanted_files())
    found = formats.recognise(folder)
    is_ours = found is None or found.name == "saelens"  # other libraries have a config.json, too
    if is_ours and (folder / CONFIG_FILE).is_file():
        return load_sae(folder), replace(read_config(folder), **given)
    missing = [f"--{name}" for name in ("model", "dataset") if name not in given]
    if missing:
        raise UsageError(f"{folder} has no {CONFIG_FILE} that names its data; give {', '.join(missing)}")
    sae = load_sae(folder)
    place = place_of(sae.metadata)
    if place is None and "layer" not in given:
        known = sae.metadata.get("hook_name") or "none"
        raise UsageError(f"{folder} names no layer that fastsae reads (its hook is {known}); give --layer, and --hook")
    return sae, TrainConfig(**{**(place._asdict() if place else {}), **given})
