"""SAELens' two files, `cfg.json` and `sae_weights.safetensors`: written atomically, read with every doubt checked."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae.disk import digest, write_json, write_tensors
from fastsae.distributed.gathered import write_tensors as write_parts
from fastsae.distributed.sharding import FEATURE_DIMS, Sharding
from fastsae.distributed.together import together
from fastsae.fields import DTYPES, Fields, is_finite, read_json
from fastsae.foreign import readers
from fastsae.sae.config_file import SavedConfig
from fastsae.version import __version__

if TYPE_CHECKING:
    from fastsae.sae.storage import StoredModule

CONFIG_FILE, WEIGHTS_FILE, SPARSITY_FILE = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SAE_LENS_VERSION = "6.54.12"  # whose format this is; below 6.0.0 SAELens would convert the file as a legacy one
# SAELens drops top-level keys that it does not know when it saves a folder, but keeps the metadata: where this key is
# left, the file is as this library wrote it, and the checksum in its metadata is that of the weights beside it
WRITER = "fastsae_version"
CHECKSUM = "weights_sha256"
_SCALING = "scaling_factor"  # a tensor of SAELens' oldest files
KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

classes: list[type[StoredModule]] = []  # each class of SAE enters itself when it is defined
logger = logging.getLogger(__name__)


def save(sae: StoredModule, path: Path, metadata: dict[str, Any]) -> None:
    """Writes both files to the folder `path`; all processes that share the SAE's features do it together."""
    sharding = getattr(sae, "sharding", None)
    if sharding is not None and sharding.data.rank > 0:
        return  # the first of the processes that see different tokens writes
    keys, state = sae.to_files()
    if sae.k_per_token is not None and "k" not in keys:
        logger.warning("k = %d is kept in the metadata only: SAELens reads this SAE as one without top-k", sae.k)
    own = {"architecture": sae.architecture, "decoder_init_norm": sae.decoder_init_norm, **sae.config()}
    config = {
        **keys,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        WRITER: __version__,
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, **metadata, "fastsae": own},
    }
    if sharding is not None and sharding.is_shared:
        _write_together(sharding, path, config, state)
        return
    _check_writable(config, state)
    write_tensors(path / WEIGHTS_FILE, {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    _write_config(path, config)


def _check_writable(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Fails before a file is written."""
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise ValueError(f"{name}: expected finite numbers to save, got NaN or infinity; nothing was written")
    json.dumps(config, allow_nan=False)


def _write_config(path: Path, config: dict[str, Any]) -> None:
    config["metadata"][CHECKSUM] = digest(path / WEIGHTS_FILE)
    write_json(path / CONFIG_FILE, config)


def _write_together(sharding: Sharding, path: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """The first process writes both files, the others that share the features send it their parts."""
    with together(sharding.features, "save the SAE"):
        _check_writable(config, state)
    with together(sharding.features, f"write {path}"):
        write_parts(path / WEIGHTS_FILE, state, FEATURE_DIMS, sharding.features)
        if sharding.features.rank == 0:
            _write_config(path, config)


def save_sparsity(log_sparsity: Tensor, d_sae: int, path: Path) -> None:
    """Writes SAELens' third file, log10 of the share of tokens on which each feature fires, to the folder `path`."""
    if log_sparsity.shape != (d_sae,) or not is_finite(log_sparsity):
        raise ValueError(
            f"log_sparsity: expected {d_sae:,} finite numbers, got shape {tuple(log_sparsity.shape)} or NaN"
        )
    write_tensors(path / SPARSITY_FILE, {"sparsity": log_sparsity.detach().float().cpu().contiguous()})


def load(path: Path, device: torch.device | str | None, wanted: type[StoredModule]) -> StoredModule:
    """Reads an SAE into the class that runs its architecture, `wanted` where more than one does."""
    if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
        for read in readers if path.exists() else ():
            found = read(path)
            if found is not None:
                return _from_content(path, *found, device, wanted)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, {name} is missing"
            )
    try:
        content = read_json(path / CONFIG_FILE)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: expected JSON, got a corrupt file ({error})") from None
    try:
        cls, config, arguments = _understood(content, wanted)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from None
    try:
        tensors = _read_weights(path / WEIGHTS_FILE, config, cls.file_shapes(config))
        return _built(cls, config, arguments, tensors, device)
    except SafetensorError as error:
        raise ValueError(
            f"{path / WEIGHTS_FILE}: expected safetensors, got a corrupt or truncated file ({error})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path / WEIGHTS_FILE}: {error}") from None


def from_saelens(sae: Any, wanted: type[StoredModule]) -> StoredModule:
    """A copy of an object of SAELens, through what it would write to its two files."""
    if not hasattr(getattr(sae, "cfg", None), "to_dict") or not isinstance(sae, torch.nn.Module):
        raise TypeError(f"sae: expected an SAE of SAELens, got {type(sae).__name__}")
    options: Any = sae.cfg
    cls, config, arguments = _understood(options.to_dict(), wanted)
    tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    _check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, cls.file_shapes(config))
    config = replace(config, dtype=tensors["W_enc"].dtype)
    return _built(cls, config, arguments, tensors, tensors["W_enc"].device)


def _understood(content: Any, wanted: type[StoredModule]) -> tuple[type[StoredModule], SavedConfig, dict[str, Any]]:
    """The class for a `cfg.json`, what that says, and the constructor's arguments."""
    config = SavedConfig.read(content, sorted({word for cls in classes for word in cls.file_architectures}))
    cls = _class_of(config, wanted)
    if config.own.get("architecture", None) != cls.architecture:
        config = replace(config, own=Fields({}))  # options of another class, which trained it
    return cls, config, cls.arguments_from(config)


def _from_content(
    path: Path,
    content: dict[str, Any],
    tensors: dict[str, Tensor],
    device: torch.device | str | None,
    wanted: type[StoredModule],
) -> StoredModule:
    """An SAE of another library's files, from what these two files would hold."""
    try:
        cls, config, arguments = _understood(content, wanted)
        return _built(cls, config, arguments, tensors, device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _class_of(config: SavedConfig, wanted: type[StoredModule]) -> type[StoredModule]:
    """The class for a folder; a BatchTopK SAE is saved as the `jumprelu` that it is at inference, so either may run it."""
    able = [cls for cls in classes if config.architecture in cls.file_architectures]
    for cls in able:
        if issubclass(wanted, cls):
            return wanted
    names = [cls.architecture for cls in able]
    trained_as = config.own.get("architecture", None)
    return able[names.index(trained_as if trained_as in names else config.architecture)]


def _read_weights(path: Path, config: SavedConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of the file, once its header and its checksum have shown that they are the expected ones."""
    with safe_open(path, framework="pt", device="cpu") as file:
        # a slice reads the header alone: a file is refused before anything of its size is allocated
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        for name, header in headers.items():
            if header.get_dtype() not in KINDS:
                raise ValueError(f"{name}: expected a tensor of {', '.join(DTYPES)}, got {header.get_dtype()}")
        found = {name: tuple(header.get_shape()) for name, header in headers.items()}
        if found.pop(_SCALING, None) == (config.d_sae,) and not torch.all(file.get_tensor(_SCALING) == 1):
            raise ValueError(f"{_SCALING}: expected ones, got others; fold them into the weights first")
        _check_shapes(found, shapes)
        _check_digest(path, config)
        return {name: file.get_tensor(name) for name in found}


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    if found != expected:
        got = dict(list(found.items())[:8])
        raise ValueError(f"expected the tensors {expected}, as {CONFIG_FILE} says, got {len(found)}: {got}")


def _check_digest(path: Path, config: SavedConfig) -> None:
    expected = config.metadata.get(CHECKSUM)
    if WRITER in config.keys and expected is not None and digest(path) != expected:
        raise ValueError(
            f"expected the file that {CONFIG_FILE} was written with (its {CHECKSUM}), got another or a damaged one. "
            f"Copy both files again; after a change on purpose, remove {CHECKSUM} from the metadata in {CONFIG_FILE}"
        )


def _built(
    cls: type[StoredModule],
    config: SavedConfig,
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
    device: torch.device | str | None,
) -> StoredModule:
    wide = torch.promote_types(config.dtype, torch.float32)
    for name, tensor in tensors.items():
        dtype = config.dtype if name in ("W_enc", "b_enc", "W_dec", "b_dec") else wide
        if not is_finite(tensor.to(dtype)):
            raise ValueError(f"{name}: expected finite numbers that {dtype} can hold, got NaN, infinity or larger ones")
    # without memory first: initial weights would be drawn for nothing, and move the global random state
    sae = cls(
        config.d_in,
        config.d_sae,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        decoder_init_norm=config.decoder_init_norm,
        dtype=config.dtype,
        device="meta",
        **arguments,
    ).to_empty(device=torch.empty(0).device if device is None else device)
    sae.load_state_dict(cls.state_from(config, tensors))
    sae.metadata = {name: value for name, value in config.metadata.items() if name != CHECKSUM}
    return sae
