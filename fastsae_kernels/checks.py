"""Argument checks of the public ops: each message names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_INDEX = 2**31 - 1


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    matches = len(shape) == tensor.dim() and all(w is None or w == s for w, s in zip(shape, tensor.shape, strict=True))
    if not matches:
        raise ValueError(f"{name}: expected {meaning}, got shape {tuple(tensor.shape)}")


def _check_like(
    name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, wider: bool = False, any_dtype: bool = False
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    if not any_dtype and tensor.dtype != dtype and not (wider and tensor.dtype == wide):
        expected = f"{dtype} as the input x" + (f", or {wide}" if wider and wide != dtype else "")
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as the input x, got {tensor.device}")


def check_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int | None, narrows: bool = False
) -> None:
    """Raises ValueError or TypeError where the encoder's arguments do not fit together; `narrows`: as autocast does."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected one of {', '.join(map(str, FLOATS))}, got {x.dtype}")
    _check_shape("W_enc", W_enc, (None, None), "two dimensions [d_in, d_sae]")
    d_in, d_sae = W_enc.shape
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(f"x: expected last dimension d_in = {d_in} as W_enc, got shape {tuple(x.shape)}")
    if d_in == 0 or not 0 < d_sae <= MAX_INDEX:
        raise ValueError(f"W_enc: expected d_in >= 1 and 1 <= d_sae < 2**31, got shape {tuple(W_enc.shape)}")
    _check_shape("b_enc", b_enc, (d_sae,), f"shape [d_sae] = ({d_sae},)")
    _check_shape("threshold", threshold, (d_sae,), f"shape [d_sae] = ({d_sae},)")
    _check_like("W_enc", W_enc, x.dtype, x.device, any_dtype=narrows)
    _check_like("b_enc", b_enc, x.dtype, x.device, wider=True)
    wide = torch.promote_types(x.dtype, torch.float32)
    if threshold.dtype != wide:
        raise TypeError(f"threshold: expected {wide} whatever the other dtypes, got {threshold.dtype}")
    if threshold.device != x.device:
        raise ValueError(f"threshold: expected device {x.device} as the input x, got {threshold.device}")
    if k is not None and k > d_sae:
        raise ValueError(f"k: expected at most d_sae = {d_sae}, got {k}")


def check_scale(name: str, scale: Tensor | None, threshold: Tensor) -> None:
    """Raises ValueError or TypeError unless the scale of that name is None or like `threshold`."""
    if scale is None:
        return
    _check_shape(name, scale, tuple(threshold.shape), f"shape [d_sae] = {tuple(threshold.shape)}")
    if scale.dtype != threshold.dtype:
        raise TypeError(f"{name}: expected {threshold.dtype} as the threshold, got {scale.dtype}")
    if scale.device != threshold.device:
        raise ValueError(f"{name}: expected device {threshold.device}, got {scale.device}")


def check_target(target: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError or TypeError unless `target` is floating-point, of the reconstruction's shape and on its device."""
    _check_shape("target", target, shape, f"shape [..., d_out] = {tuple(shape)}")
    if not target.is_floating_point():
        raise TypeError(f"target: expected a floating-point tensor, got {target.dtype}")
    if target.device != device:
        raise ValueError(f"target: expected device {device} as the input x, got {target.device}")


def check_decode(
    d_sae: int, dtype: torch.dtype, device: torch.device, W_dec: Tensor, b_dec: Tensor | None, narrows: bool = False
) -> None:
    """Raises ValueError or TypeError where the decoder's arguments do not fit together; `narrows`: as autocast does."""
    _check_shape("W_dec", W_dec, (d_sae, None), f"shape [d_sae, d_out] = ({d_sae}, d_out)")
    if dtype not in FLOATS:
        raise TypeError(f"W_dec: expected one of {', '.join(map(str, FLOATS))}, got {dtype}")
    _check_like("W_dec", W_dec, dtype, device, any_dtype=narrows)
    if b_dec is not None:
        _check_shape("b_dec", b_dec, (W_dec.shape[1],), f"shape [d_out] = ({W_dec.shape[1]},)")
        _check_like("b_dec", b_dec, dtype, device, wider=True)
