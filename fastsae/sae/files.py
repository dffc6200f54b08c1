"""SAELens' two files, `cfg.json` and `sae_weights.safetensors`: written atomically, read with every doubt checked."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from fastsae.sae.base import SparseAutoencoder

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAE_LENS_VERSION = "6.54.12"  # whose format this is; below 6.0.0 SAELens would convert the file as a legacy one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

logger = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file beside `path`, then moves it into place; nothing half-written stays behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk, so that a power cut cannot undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file atomically; a full disk is an OSError as everywhere else."""

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))  # safetensors hides the system's error in its text
            if found is None:
                raise
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error

    write_atomically(path, write)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, with a line per entry; NaN is not JSON and is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save(sae: SparseAutoencoder, path: Path, metadata: dict[str, Any]) -> None:
    """Writes both files to the folder `path`."""
    keys, state = sae.to_files()
    if sae.k_per_token is not None and "k" not in keys:
        logger.warning("k = %d is kept in the metadata only: SAELens reads this SAE as one without top-k", sae.k)
    own = {"architecture": sae.architecture, **sae.config()}
    config = {
        **keys,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, **metadata, "fastsae": own},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    json.dumps(config, allow_nan=False)  # metadata that is no JSON fails before a file is written
    write_tensors(path / WEIGHTS_FILE, tensors)
    write_json(path / CONFIG_FILE, config)


def load(path: Path, device: torch.device | str | None, wanted: type[SparseAutoencoder]) -> SparseAutoencoder:
    """Reads both files into the class that runs their architecture, `wanted` where more than one does."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, {name} is missing"
            )
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS_FILE, device="cpu")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: expected JSON, got a corrupt file ({error})") from None
    except SafetensorError as error:
        raise ValueError(
            f"{path / WEIGHTS_FILE}: expected safetensors, got a corrupt or truncated file ({error})"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path / CONFIG_FILE}: expected a JSON object with SAELens' keys, got {type(config).__name__}"
        )
    sae = _build(path, config, tensors, device, wanted)
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise ValueError(f"{path / WEIGHTS_FILE}: expected the tensors {expected}, got {found}")
    sae.load_state_dict(tensors)
    return sae


def _class_of(path: Path, config: dict[str, Any], trained_as: Any, wanted: type[SparseAutoencoder]) -> Any:
    """The class for a folder; a BatchTopK SAE is saved as the `jumprelu` that it is at inference, so either may run it."""
    from fastsae.sae.batch_topk import FusedBatchTopKSAE
    from fastsae.sae.jumprelu import FusedJumpReLUSAE
    from fastsae.sae.relu import FusedReLUSAE
    from fastsae.sae.topk import FusedTopKSAE

    known = (FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, FusedBatchTopKSAE)
    classes: dict[Any, type[SparseAutoencoder]] = {cls.architecture: cls for cls in known}
    architecture = config.get("architecture")
    if architecture not in classes:
        raise ValueError(f"{path}: expected architecture {' or '.join(classes)}, got {architecture!r}")
    if architecture != FusedJumpReLUSAE.architecture:
        return classes[architecture]
    for cls in (FusedJumpReLUSAE, FusedBatchTopKSAE):
        if issubclass(wanted, cls):
            return cls
    return FusedBatchTopKSAE if trained_as == FusedBatchTopKSAE.architecture else FusedJumpReLUSAE


def _build(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    device: torch.device | str | None,
    wanted: type[SparseAutoencoder],
) -> SparseAutoencoder:
    metadata = dict(config.get("metadata") or {})
    own = dict(metadata.pop("fastsae", None) or {})
    cls = _class_of(path, config, own.get("architecture"), wanted)
    for option in ("normalize_activations", "reshape_activations"):
        if config.get(option, "none") != "none":
            raise ValueError(
                f"{path}: expected {option} 'none', got {config[option]!r}; fold it into the weights first"
            )
    if own.pop("architecture", cls.architecture) != cls.architecture:
        own = {}  # options of the class that trained it, which is not the class asked for
    try:
        sae: SparseAutoencoder = cls(
            config["d_in"],
            config["d_sae"],
            apply_b_dec_to_input=config.get("apply_b_dec_to_input", True),
            dtype=DTYPES[config.get("dtype", "float32")],
            device=device,
            **cls.from_files(config, own, tensors),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path / CONFIG_FILE}: expected SAELens' keys for {cls.architecture}, got a problem with {error}"
        ) from None
    sae.metadata = metadata
    return sae
