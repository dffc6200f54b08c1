"""What a `cfg.json` says: SAELens' keys of version 6 and of the versions before it, each checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastsae.errors import shown
from fastsae.fields import DTYPES, Fields

# normalisations that SAELens can fold into the weights
_FOLDABLE = ("expected_average_only_in", "covariance_whitening")
_INITIAL = "decoder_init_norm"  # ours, or that of a checkpoint of SAELens, where it may be null
_LARGEST = 2**31 - 1  # the largest size that is read; the weights' header says which it really is
# what SAELens wrote at the top before version 6, and keeps in the metadata since
_OLD_METADATA = (
    "model_name hook_name model_class_name hook_head_index model_from_pretrained_kwargs prepend_bos "
    "exclude_special_tokens neuronpedia_id context_size seqpos_slice dataset_path sae_lens_training_version"
).split()
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


@dataclass(frozen=True)
class SavedConfig:
    """A checked `cfg.json`.

    Args:
        keys: All of its keys, the names of older versions replaced by today's.
        architecture: SAELens' word.
        metadata: Its metadata, without what this library keeps there for itself.
        own: What this library keeps there; empty where another program wrote the file.
    """

    keys: Fields
    architecture: str
    d_in: int
    d_sae: int
    dtype: torch.dtype
    apply_b_dec_to_input: bool
    decoder_init_norm: float
    metadata: dict[str, Any]
    own: Fields

    @classmethod
    def read(cls, content: Any, architectures: list[str]) -> SavedConfig:
        """Checks the keys that every architecture has.

        Raises:
            ValueError: A key is missing, or its value is not what it can be.
        """
        found = Fields(content)
        metadata = dict(found.fields("metadata", default={}).values)
        if is_old(found, metadata):
            found = modern(found)
            metadata |= old_metadata(found)
        own = Fields(metadata.pop("fastsae", None) or {}, "metadata.fastsae.")
        if own.values:
            own.choice("architecture", architectures)
        initial = next((one for one in (own, found) if one.values.get(_INITIAL) is not None), Fields({}))
        architecture = found.choice("architecture", architectures)
        for option in ("normalize_activations", "reshape_activations"):
            value = found.get(option, "none")
            if value not in ("none", False):
                why = "fold it into the weights first" if value in _FOLDABLE else "this library does not compute it"
                raise ValueError(f"{option}: expected 'none', got {shown(value)}; {why}")
        dtype = found.get("dtype", "float32")
        if isinstance(dtype, str) and dtype.startswith("torch."):
            dtype = dtype.removeprefix("torch.")  # as SAELens once wrote it, and still reads it
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise found.wrong("dtype", " or ".join(DTYPES))
        return cls(
            keys=found,
            architecture=architecture,
            d_in=found.integer("d_in", 1, _LARGEST),
            d_sae=found.integer("d_sae", 1, _LARGEST),
            dtype=DTYPES[dtype],
            apply_b_dec_to_input=found.boolean("apply_b_dec_to_input", default=True),
            decoder_init_norm=initial.number(_INITIAL, 0, above=True, default=1.0),
            metadata=metadata,
            own=Fields({name: value for name, value in own.values.items() if name != _INITIAL}, own.place),
        )


def is_old(found: Fields, metadata: dict[str, Any]) -> bool:
    """Whether SAELens before version 6 wrote the file, which named no version or another one."""
    version = found.values.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version is None:
        return True
    major = str(version).split(".")[0]
    return major.isdigit() and len(major) < 4 and int(major) < 6


def old_metadata(found: Fields) -> dict[str, Any]:
    """What an old file says at its top and a new one in its metadata."""
    return {name: found.values[name] for name in _OLD_METADATA if name in found}


def modern(found: Fields) -> Fields:
    """The keys as version 6 names them."""
    keys = {_RENAMED.get(name, name): value for name, value in found.values.items()}
    activation = keys.get("activation_fn") or "relu"
    if activation == "topk":
        keys["architecture"] = "topk"
        keys.setdefault("k", Fields(keys).fields("activation_fn_kwargs", default={}).values.get("k"))
    elif activation != "relu":
        raise ValueError(f"activation_fn: expected relu or topk, got {shown(activation)}")
    keys.setdefault("architecture", "standard")
    if keys.get("finetuning_scaling_factor"):
        raise ValueError("finetuning_scaling_factor: expected false, got true; fold it into the weights first")
    return Fields(keys)
