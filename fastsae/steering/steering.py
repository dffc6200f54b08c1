"""Hooks that edit the residual stream of a language model while a block lasts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.data.activations import ResidualStream, position_limit
from fastsae.data.hooks import HOOKS, Place, place_of
from fastsae.errors import UsageError, shown
from fastsae.sae import SparseAutoencoder
from fastsae.steering.edits import Deltas, Edit, check_edits, is_finite
from fastsae.steering.positions import Positions, Region


class Steering:
    """What a block of `steer` is told and tells while it lasts; `steer` makes it."""

    def __init__(self, residual: ResidualStream, deltas: Deltas, positions: Positions) -> None:
        self._residual, self._deltas, self._positions = residual, deltas, positions
        self._limit = position_limit(residual.model)
        self._scale: float | Tensor = 1.0
        self._is_paused = False
        self._depth = 0  # how many modules that a pass may begin in are running, one inside of the other
        self._region: Region | None = None  # of the pass that runs
        self._shape: tuple[int, ...] = ()  # (B, T, d_in) of it
        self._last: Tensor | None = None  # [B, d_in], each row's last real token before the edit
        self._acts: Tensor | None = None  # [B, n] of the same tokens, computed when they are asked for or needed

    @property
    def scale(self) -> float | Tensor:
        """What the sum of all deltas is multiplied with: a number, or `[B]`, one for each row. At 0 no bit changes."""
        return self._scale

    @scale.setter
    def scale(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.dim() != 1 or value.dtype == torch.bool or value.is_complex():
                raise UsageError(f"scale: expected a number, or a tensor [B] of numbers, got {shown(value)}")
        elif not is_finite(value):
            raise UsageError(f"scale: expected a finite number, or a tensor [B], got {shown(value)}")
        self._scale = value if isinstance(value, Tensor) else float(value)

    @property
    def feature_acts(self) -> Tensor | None:
        """`[B, n_edits]`: the activation of each edit's feature in the last pass, before the edit, on each row's last real token.

        Edits of directions have 0. None before the first pass.
        """
        if self._last is None:
            return None
        if self._acts is None:
            self._acts = self._deltas.feature_acts(self._deltas.wide(self._last))
        return self._deltas.by_edit(self._acts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes inside are not edited, and do not count in the positions."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        model: Any = self._residual.model
        with ExitStack() as stack:
            # a compiled model would run graphs that know nothing of the hooks, or go on to run those that do
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in _entries(model):
                self._follow(module, stack)
            stack.enter_context(self._residual.changed(self._edited))
            if callable(getattr(model, "generate", None)):
                stack.enter_context(_replaced(model, "generate", self._telling_the_prompt(model.generate)))
            yield

    def _follow(self, module: nn.Module, stack: ExitStack) -> None:
        """Has each pass that begins in this module told, unless it is part of one that has begun in another."""
        names = list(inspect.signature(module.forward).parameters)

        def before(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._depth += 1
            if self._depth == 1 and not self._is_paused:
                self._begin_pass({**dict(zip(names, args, strict=False)), **options})

        def after(*_: Any) -> None:
            self._depth -= 1

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, always_call=True).remove)  # after errors, too

    def _telling_the_prompt(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, telling the positions what its prompt is, which single passes do not show."""
        config = getattr(self._residual.model, "generation_config", None)

        @wraps(generate)
        def telling(*args: Any, **options: Any) -> Any:
            if self._is_paused:
                return generate(*args, **options)
            own = args[1] if len(args) > 1 else options.get("generation_config")
            self._positions.check_beams(options.get("num_beams") or getattr(own or config, "num_beams", None) or 1)
            prompt = args[0] if args else options.get("inputs", options.get("input_ids"))
            embeds, mask = options.get("inputs_embeds"), options.get("attention_mask")
            n_columns = max([one.shape[1] for one in (prompt, embeds, mask) if isinstance(one, Tensor)], default=1)
            is_whole = isinstance(prompt, Tensor) and prompt.shape[1] == n_columns
            with self._positions.generating(prompt if is_whole else None, n_columns):
                return generate(*args, **options)

        return telling

    def _begin_pass(self, inputs: dict[str, Any]) -> None:
        found = inputs.get("input_ids")
        found = inputs.get("inputs_embeds") if found is None else found
        if not isinstance(found, Tensor) or found.dim() < 2:
            raise UsageError(f"input_ids: expected a tensor [B, T] for a pass of a steered model, got {shown(found)}")
        mask = inputs.get("attention_mask")
        n_cached = _cached_columns(inputs, found.shape[1], self._positions.n_columns)
        self._check_length(n_cached + found.shape[1], mask)
        self._region = self._positions.advance(found, n_cached, mask)
        self._shape = (*found.shape[:2], self._residual.d_in)

    def _check_length(self, n_columns: int, mask: Any) -> None:
        if self._limit is None or n_columns <= self._limit:
            return
        n_tokens = n_columns
        if isinstance(mask, Tensor) and mask.dim() == 2:
            n_tokens = int(mask.bool().sum(1).max())
        if n_tokens > self._limit:
            raise UsageError(
                f"generation: expected at most {self._limit:,} tokens, the context of the model, prompt and answer together, got "
                f"{n_tokens:,}"
            )

    def _edited(self, hidden: Tensor) -> Tensor:
        if self._is_paused:
            return hidden
        if self._region is None or hidden.shape != self._shape:
            raise UsageError(
                "model: expected a pass of the whole model, whose blocks get hidden states [batch, tokens, width] of the ids "
                f"that it was given, got {shown(hidden)} in block {self._residual.layer}"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            return self._edit(hidden, self._region)

    def _edit(self, hidden: Tensor, region: Region) -> Tensor:
        deltas, scale = self._deltas, self._row_scale(hidden)
        if region.start == region.stop or (not isinstance(scale, Tensor) and scale == 0):
            self._keep_last(_last_tokens(hidden, region.last), None, region)
            return hidden
        part = hidden[:, region.start : region.stop]
        wide = deltas.wide(part)
        acts = deltas.feature_acts(wide) if deltas.read_acts else None
        ends_here = region.last is None and region.stop == hidden.shape[1]
        last_acts = acts[:, -1] if acts is not None and ends_here else None
        self._keep_last(_last_tokens(hidden, region.last), last_acts, region)
        delta = deltas(wide, acts)
        if delta is None:
            return hidden
        if isinstance(scale, Tensor) or scale != 1:
            delta = scale * delta
        edited = _kept(part, (wide + delta).to(hidden.dtype), region.chosen, scale)
        if edited.shape[1] == hidden.shape[1]:
            return edited
        return torch.cat([hidden[:, : region.start], edited, hidden[:, region.stop :]], 1)

    def _row_scale(self, hidden: Tensor) -> float | Tensor:
        """The scale, where it is a tensor as `[B, 1, 1]` in the dtype of deltas."""
        if not isinstance(self._scale, Tensor):
            return self._scale
        if len(self._scale) != len(hidden):
            raise UsageError(f"scale: expected one number for each of {len(hidden)} rows, got {shown(self._scale)}")
        return self._scale.to(hidden.device, torch.promote_types(hidden.dtype, torch.float32))[:, None, None]

    def _keep_last(self, last: Tensor, acts: Tensor | None, region: Region) -> None:
        """Keeps what `feature_acts` needs; a row of padding alone, as chunks of a long batch have it, keeps what it had."""
        if region.last is not None and self._last is not None and self._last.shape == last.shape:
            last = torch.where((region.last < 0).to(last.device)[:, None], self._last, last)
        self._last = last.detach().clone()  # later blocks may change their input in place
        self._acts = None if acts is None else acts.detach()


def _last_tokens(hidden: Tensor, last: Tensor | None) -> Tensor:
    """`[B, d]`, each row's last real token."""
    if last is None:
        return hidden[:, -1]
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device).clamp_min(0)]


def _kept(hidden: Tensor, edited: Tensor, chosen: Tensor | None, scale: float | Tensor) -> Tensor:
    """`edited`, but `hidden` to the bit in rows whose scale is 0 and on tokens that are not chosen."""
    is_edited = None if chosen is None else chosen.to(hidden.device)[..., None]
    if isinstance(scale, Tensor):
        is_edited = scale != 0 if is_edited is None else is_edited & (scale != 0)
    return edited if is_edited is None else torch.where(is_edited, edited, hidden)


def _entries(model: Any) -> list[nn.Module]:
    """The modules that a pass may begin in: the model, its body, its decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = (model, getattr(model, "base_model", None), decoder)
    return list(dict.fromkeys(module for module in found if isinstance(module, nn.Module)))


def _cached_columns(inputs: dict[str, Any], n_tokens: int, n_before: int) -> int:
    """How many columns are in the cache of a pass over `n_tokens` columns, where `n_before` have gone by."""
    cache: Any = inputs.get("past_key_values", inputs.get("cache_params"))
    mask = inputs.get("attention_mask")
    has_length = hasattr(cache, "get_seq_length")
    if has_length:
        try:
            return int(cache.get_seq_length())
        except ValueError:  # it holds recurrent states alone
            pass
    told = mask.shape[1] - n_tokens if isinstance(mask, Tensor) and mask.dim() == 2 else 0
    return max(told, n_before if has_length and n_tokens == 1 else 0)


@contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Puts a value in the place of a method, as an attribute of this one object."""
    before = thing.__dict__.get(name)  # set where another block, or another library, has done so
    thing.__dict__[name] = value
    try:
        yield
    finally:
        del thing.__dict__[name]
        if before is not None:
            thing.__dict__[name] = before


def _find_place(sae: SparseAutoencoder | None, layer: int | None, hook: str | None) -> Place:
    named = None if sae is None else place_of(sae.metadata)
    if layer is None:
        if named is None:
            got = "none" if sae is None else sae.metadata.get("hook_name") or "none"
            raise UsageError(
                f"layer: expected the layer to steer, because the SAE names no place that is known (its hook: {got})"
            )
        return named if hook is None else Place(named.layer, hook)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise UsageError(f"layer: expected an integer, got {shown(layer)}")
    return Place(layer, hook or (named.hook if named else "resid_post"))


@contextmanager
def steer(
    model: Any,
    sae: SparseAutoencoder | None,
    edits: Sequence[Edit],
    positions: str | Tensor = "all",
    *,
    tokenizer: Any = None,
    layer: int | None = None,
    hook: str | None = None,
) -> Iterator[Steering]:
    """While the block lasts, passes of the model run with edited hidden states: h + scale * (sum of the edits' deltas).

        with fastsae.steer(model, sae, [Edit(13794, "add", 50.0)]):
            model.generate(...)

    Deltas are those of `Edit`, all from the same h, computed in fp32 (fp64 where model or SAE has it) and rounded once. Blocks
    nest: an inner one gets what the outer one of the same place has made. Weights are read once at the beginning. Graphs of
    `torch.compile` know nothing of hooks, so in the block whatever was compiled runs without its graphs.

    Args:
        model: A causal language model of transformers, compiled or not.
        sae: The SAE whose features the edits name; may be None where all are directions.
        edits: What is done.
        positions: Which tokens are edited: `all`, `prompt`, `generated` (by the model itself), `special` (what the chat template
            writes around turns), `assistant` (what the assistant says), or a mask, see `Positions`.
        tokenizer: The model's, needed for `special` and `assistant`.
        layer: The decoder block; that of the SAE's metadata where None.
        hook: The place in it, one of `fastsae.data.hooks.HOOKS`; that of the SAE's metadata, else `resid_post`.

    Raises:
        UsageError: Arguments do not fit together, a feature is dead, or (of a pass) positions cannot be told or the text is
            longer than the model's context.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides the module that hooks are put on
    if not hasattr(model, "config") or getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"model: expected a language model of transformers, a decoder alone, got {type(model).__name__}"
        )
    place = _find_place(sae, layer, hook)
    if place.hook not in HOOKS:
        raise UsageError(f"hook: expected one of {', '.join(HOOKS)}, got {shown(place.hook)}")
    residual = ResidualStream(model, place.layer, place.hook)
    check_edits(edits, sae, residual.d_in)
    steering = Steering(residual, Deltas(edits, sae), Positions(positions, tokenizer))
    with steering._hooked():
        yield steering
