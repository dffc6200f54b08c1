"""Where in a decoder block activations are read: the names of the places, and the modules that they belong to.

    resid_pre     the residual stream before the block
    attn_out      what its attention adds to the stream
    mlp_out       what its MLP, or its experts, add to the stream
    resid_post    the residual stream after the block

As in TransformerLens, where a model normalises a part's output before it is added (Gemma 2 and 3, OLMo 2, GLM 4), `attn_out` and
`mlp_out` are read behind that norm. Where it multiplies them by a constant (Granite), they are read before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from fastsae.errors import UsageError

HOOKS = ("resid_pre", "attn_out", "mlp_out", "resid_post")  # in the order in which a pass reaches them
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_MODULES = {
    "attn_out": ("post_self_attn_layernorm", *_ATTENTION),
    "mlp_out": ("post_feedforward_layernorm", "post_mlp_layernorm", *_MLP),
}
# the norm of this name stands behind the attention only where this one stands behind the MLP: in others it is the MLP's first
_NORM_BEHIND_ATTENTION, _NORM_BEHIND_MLP = "post_attention_layernorm", "post_feedforward_layernorm"
_LENS = re.compile(rf"blocks\.(\d{{1,4}})\.hook_({'|'.join(HOOKS)})", re.ASCII)
_MODULE = re.compile(r"(?:.*\.)?(?:layers|layer|blocks|h)\.(\d{1,4})(?:\.(\w+))?", re.ASCII)


class Place(NamedTuple):
    """Where an SAE reads: a decoder block, counted from 0, and one of `HOOKS`."""

    layer: int
    hook: str

    @property
    def lens_name(self) -> str:
        """TransformerLens' name."""
        return f"blocks.{self.layer}.hook_{self.hook}"

    @property
    def as_output(self) -> Place:
        """The same place as the output of a module: the stream before a block is that after the one before."""
        return Place(self.layer - 1, "resid_post") if self.hook == "resid_pre" and self.layer else self


def find_module(block: nn.Module, hook: str) -> nn.Module:
    """The module of a decoder block that a hook is on: its input for `resid_pre`, its output for the others.

    Raises:
        UsageError: The block has none that is known.
    """
    if hook not in _MODULES:
        return block
    names: tuple[str, ...] = _MODULES[hook]
    if hook == "attn_out" and isinstance(getattr(block, _NORM_BEHIND_MLP, None), nn.Module):
        names = (_NORM_BEHIND_ATTENTION, *names)
    for name in names:
        if isinstance(module := getattr(block, name, None), nn.Module):
            return module
    there = ", ".join(name for name, _ in block.named_children())
    raise UsageError(
        f"hook: expected for {hook} a decoder block with a module named {' or '.join(names)}, found {there} in "
        f"{type(block).__name__}; take resid_post or resid_pre"
    )


def place_of(metadata: Mapping[str, Any]) -> Place | None:
    """The place that the metadata of an SAE names, of this library or of another one; None where it names none of `HOOKS`.

    Names are those of TransformerLens (`blocks.3.hook_mlp_out`) and of modules of transformers (`model.layers.3.mlp`).
    """
    own = metadata.get("hook_layer"), metadata.get("hook")
    if type(own[0]) is int and own[1] in HOOKS:
        return Place(own[0], own[1])
    name = str(metadata.get("hook_name", ""))
    if found := _LENS.fullmatch(name):
        return Place(int(found[1]), found[2])
    found = _MODULE.fullmatch(name)
    if found is None:
        return None
    hook = "resid_post" if found[2] is None else next((h for h, names in _MODULES.items() if found[2] in names), None)
    return None if hook is None else Place(int(found[1]), hook)
