"""Strangers' tensor files, opened without running anything in them and checked by their headers before memory is taken."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae.errors import shown
from fastsae.fields import is_finite

_KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}
_NUMPY = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
_MOST_FILES = 64
_DEFLATE_RATIO = 1032  # no stream of zip's grows more


class Stored(NamedTuple):
    """A tensor in a file, of which the header alone has been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def open_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, whose library checks sizes against the file's own."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            kinds = {**_KINDS, **_INTEGERS}
            return {
                name: Stored(tuple(header.get_shape()), kinds[header.get_dtype()], _safetensor(path, name))
                if header.get_dtype() in kinds
                else header.get_dtype()
                for name, header in headers.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, got a corrupt or truncated file ({error})") from None


def _safetensor(path: Path, name: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)

    return load


def open_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: a dict of tensors, numbers, texts and dicts of those; a pickle that does anything is refused.

    The file is mapped, so that its tensors take no memory until they are used.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: expected a zip file of torch.save, got another; files of torch before 1.6 are bare pickles: load it where "
            "you trust it and save it again"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path}: expected tensors, numbers and texts that torch.save wrote, got a file that torch.load(weights_only=True) "
            f"refuses ({type(error).__name__}: {reason})"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: expected a state dict, got {shown(content)}")
    return {name: _from_torch(path, name, value) for name, value in content.items()}


def _from_torch(path: Path, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{path}: {shown(name)}: expected a dense tensor, got {value.layout} on {value.device}")
    value = value.detach()
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {shown(name)}: expected as many numbers as its shape says, got fewer, repeated by strides"
        )
    return Stored(tuple(value.shape), value.dtype, lambda: value)


def open_npz(path: Path) -> dict[str, Any]:
    """The arrays of an npz file; none that would need a pickle, and none larger than the file can hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > _MOST_FILES:
                raise ValueError(f"{path}: expected at most {_MOST_FILES} arrays, got {len(members)}")
            return {info.filename.removesuffix(".npy"): _array_header(path, archive, info) for info in members}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: expected npz, got a corrupt or truncated file ({error})") from None


def _array_header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stored:
    place = f"{path}: {shown(info.filename)}"
    if not info.filename.endswith(".npy"):
        raise ValueError(f"{place}: expected arrays in an npz file, whose names end in .npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{place}: expected an array stored or deflated, got compression {info.compress_type}")
    with archive.open(info) as file:
        shape, in_columns, dtype, size = _npy_header(place, file)
    n_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATE_RATIO
    most = min(info.compress_size, path.stat().st_size) * ratio
    if info.file_size != size + n_bytes or info.file_size > most:
        raise ValueError(
            f"{place}: expected {n_bytes:,} bytes of {dtype} {list(shape)}, as its header says, but the file holds other or fewer"
        )

    def load() -> Tensor:
        with zipfile.ZipFile(path) as archive, archive.open(info) as file:
            file.read(size)
            content = file.read(n_bytes)
        if len(content) != n_bytes:
            raise ValueError(f"{place}: expected {n_bytes:,} bytes, got {len(content):,}")
        flat = np.frombuffer(bytearray(content), dtype=dtype).astype(dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.ascontiguousarray(flat.reshape(shape, order="F" if in_columns else "C")))

    kind = _NUMPY.get(dtype.newbyteorder("=").name, torch.int64)
    return Stored(shape, kind, load)


def _npy_header(place: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, column order, dtype, and the length of the header."""
    stream: BinaryIO = file
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, in_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, in_columns, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"version {version} of the format is not known")
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{place}: expected an array of numpy.save, got another header ({' '.join(str(error).split())[:160]})"
        ) from None
    if dtype.hasobject or dtype.newbyteorder("=").name not in _NUMPY:
        raise ValueError(f"{place}: expected floating-point numbers, got {dtype}; a pickle is never read")
    return tuple(shape), in_columns, dtype, stream.tell()


def take(
    path: Path, stored: Mapping[str, Any], shapes: Mapping[str, str], sizes: Mapping[str, int], *, optional: str = ""
) -> dict[str, Tensor]:
    """Tensors by name, once all headers have shown that names, sizes and dtypes are the expected ones.

    Args:
        path: For messages.
        stored: What one of the functions above gave.
        shapes: By name, the names of its sizes, such as `"d_sae d_in"`.
        sizes: Those that are known; the file says the others, once for all tensors.
        optional: Names that may be missing.

    Raises:
        ValueError: A tensor is missing or unknown, its shape or dtype is another, or it holds NaN or infinity.
    """
    known = dict(sizes)
    missing = [name for name in shapes if name not in stored and name not in optional.split()]
    if missing:
        raise ValueError(f"{path}: {missing[0]}: expected a tensor, but it is missing; there are {_names(stored)}")
    unknown = [name for name in stored if name not in shapes]
    if unknown:
        raise ValueError(f"{path}: {shown(unknown[0])}: expected no such tensor, only {', '.join(shapes)}")
    found = [name for name in shapes if name in stored]
    for name in found:
        _check_header(path, name, stored[name], shapes[name].split(), known)
    tensors = {name: stored[name].load() for name in found}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or infinity")
    return tensors


def _check_header(path: Path, name: str, header: Any, dims: list[str], known: dict[str, int]) -> None:
    expected = ", ".join(f"{dim} = {known[dim]}" if dim in known else dim for dim in dims)
    if not isinstance(header, Stored):
        raise ValueError(f"{path}: {name}: expected a tensor [{expected}], got {shown(header)}")
    if header.dtype not in _KINDS.values():
        raise ValueError(f"{path}: {name}: expected floating-point numbers, got {header.dtype}")
    fits = len(header.shape) == len(dims) and all(
        known.get(dim, got) == got and got > 0 for dim, got in zip(dims, header.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{path}: {name}: expected shape [{expected}], got {list(header.shape)}")
    known.update(zip(dims, header.shape, strict=True))


def scalar(path: Path, stored: Mapping[str, Any], name: str) -> float | int | None:
    """A number that was stored by itself or as a tensor of one element; None where it is missing."""
    value = stored.get(name)
    if isinstance(value, Stored) and np.prod(value.shape, dtype=object) == 1:
        value = value.load().item()
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(
        f"{path}: {name}: expected a number, got {shown(value) if not isinstance(value, Stored) else value.shape}"
    )


def _names(stored: Mapping[str, Any]) -> str:
    names = [shown(name)[1:-1] for name in list(stored)[:8]]
    return ", ".join(names) + (", ..." if len(stored) > 8 else "") if names else "none"
