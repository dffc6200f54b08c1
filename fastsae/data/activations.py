"""The residual stream of any causal language model, or what a block adds to it: read it at one layer, or replace it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.data.hooks import HOOKS, Place, find_module
from fastsae.errors import FastsaeError, UsageError
from fastsae.machine import to_device


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of decoder blocks: the outermost ModuleList with `num_hidden_layers` entries.

    Raises:
        UsageError: The model has none.
    """
    n_layers = getattr(text_config(model.config), "num_hidden_layers", None)
    root: Any = model
    if hasattr(model, "get_decoder") and isinstance(model.get_decoder(), nn.Module):
        root = model.get_decoder()  # of a model with images or sound: the language part
    for scope in (root, model):
        lists = [
            (name.count("."), module)
            for name, module in scope.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == n_layers
        ]
        if lists:
            return min(lists, key=lambda entry: entry[0])[1]
    raise unsupported(model, f"expected a ModuleList of {n_layers} decoder blocks, found none")


def check_layer(model: Any, layer: int) -> None:
    """Raise UsageError unless `layer` is the number of one of the model's blocks, counted from 0."""
    n_layers = len(decoder_layers(model))
    if not 0 <= layer < n_layers:
        raise UsageError(f"layer: expected 0 to {n_layers - 1} (the model has {n_layers} layers), got {layer}")


def position_limit(model: Any) -> int | None:
    """Return the most tokens that the model takes, by its positions; None where its configuration names no limit."""
    config = text_config(model.config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 1]
    if not found:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    scaling = scaling if isinstance(scaling, dict) else {}
    scaled = (scaling.get("factor") or 1) * (scaling.get("original_max_position_embeddings") or min(found))
    return max(min(found), int(scaled))  # rotary positions may be scaled beyond those of the training


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise UsageError if words of the tokenizer lie outside of the model's embedding; added tokens may, if none is used."""
    n_rows = n_embeddings(model)
    added = tokenizer.added_tokens_decoder
    largest = max((index for index in tokenizer.get_vocab().values() if index not in added), default=0)
    if largest >= n_rows:
        raise UsageError(
            f"model: expected token ids below {n_rows}, the rows of its embedding, but its tokenizer has ids up to "
            f"{largest}; the tokenizer belongs to another model"
        )


def n_embeddings(model: Any) -> int:
    """Return the number of tokens that the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def text_config(config: Any) -> Any:
    """Return the configuration of a model's language part, which is the whole one if it has no other parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def unsupported(model: Any, reason: str) -> UsageError:
    """Return the error for a model that cannot be read or evaluated rightly."""
    return UsageError(
        f"model: models of type {model.config.model_type!r} ({type(model).__name__}) are not supported: {reason}"
    )


class ResidualStream:
    """The residual stream after decoder block `layer`, counted from 0, or at another place of that block.

    This is `hidden_states[layer + 1]` of transformers, except after the last block, where transformers reports it
    behind the final norm and this class before it. Rows are padded on the right, so positions count from 0 in each;
    the ids there may be any. Nothing is differentiated.

    Args:
        model: A causal language model of transformers.
        layer: The decoder block.
        hook: The place in it, one of `fastsae.data.hooks.HOOKS`.

    Attributes:
        place: Layer and hook.
        module: What the hook is on: the block, its attention or its MLP.
        d_in: Width of the residual stream.
        device: Device of the model's embedding, where inputs are moved to.
        blocks_can_be_skipped: Whether the blocks before this layer have no influence on a pass in which its output is
            replaced; None until `fastsae.data.splicing.SplicedModel.check` has found out.

    Raises:
        UsageError: `layer` is out of range, the model has no list of decoder blocks, or the block no such place.
    """

    def __init__(self, model: Any, layer: int, hook: str = "resid_post") -> None:
        check_layer(model, layer)
        self.model = model
        self.layer = layer
        self.place = Place(layer, hook)
        self.block = decoder_layers(model)[layer]
        self.module = find_module(self.block, hook)
        self.d_in: int = text_config(model.config).hidden_size
        self.blocks_can_be_skipped: bool | None = None
        self._n_embeddings = n_embeddings(model)

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the activations [B, T, d_in], in the model's dtype; later blocks and the logits are not computed.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T], zero or False on padding. Activations there are meaningless.
            position_ids: [B, T] for rows of several dialogues that do not see each other: a dialogue begins wherever they do
                not count on. Not every model heeds them, see `fastsae.data.packing`. None where each row is one context.

        Raises:
            UsageError: The blocks of this model return something else.
            FastsaeError: An activation of a real token is NaN or infinite, or a token has no embedding.
        """

        def stop(hidden: Tensor) -> Tensor:
            raise _Stop(hidden)

        acts: Tensor | None = None
        with self.changed(stop):
            try:
                self._forward(self.model.base_model, input_ids, attention_mask, position_ids)
            except _Stop as reached:
                acts = reached.hidden
        if acts is None:
            raise unsupported(self.model, f"its forward pass did not reach layer {self.layer}")
        return self.checked(acts, input_ids, attention_mask)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the model's own logits [B, T, vocabulary]."""
        logits: Tensor = self._forward(self.model, input_ids, attention_mask).logits
        return logits

    @torch.no_grad()
    def splice(self, input_ids: Tensor, attention_mask: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits [B, T, vocabulary] with the activations h [B, T, d_in] replaced by `replace(h)`.

        The result of `replace` is cast to the dtype of h.
        """
        with self.changed(lambda hidden: replace(hidden).to(hidden.dtype)):
            return self.logits(input_ids, attention_mask)

    @contextmanager
    def changed(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While this lasts, the hidden states at this place are `change(hidden)`."""

        def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = change(self.hidden_states(output))
            return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

        def on_input(_module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
            if args:
                return (change(self.hidden_states(args)), *args[1:]), options
            return args, {**options, "hidden_states": change(self.hidden_states(options.get("hidden_states")))}

        if self.place.hook == "resid_pre":
            handle = self.module.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            handle = self.module.register_forward_hook(on_output)
        try:
            yield
        finally:
            handle.remove()

    def hidden_states(self, output: Any) -> Tensor:
        """Return the hidden states of what a module returned or a block was given: alone, or first in a tuple or list."""
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(hidden, Tensor):
            does = "are given" if self.place.hook == "resid_pre" else "return"
            name = "decoder blocks" if self.module is self.block else type(self.module).__name__
            raise unsupported(self.model, f"its {name} {does} {type(output).__name__}, expected a tensor")
        return hidden

    def check_shape(self, hidden: Tensor, input_ids: Tensor) -> None:
        """Raise UsageError unless `hidden` is [B, T, d_in]: one residual stream."""
        expected = [*input_ids.shape, self.d_in]
        if list(hidden.shape) != expected:
            raise unsupported(
                self.model,
                f"expected one residual stream, or what is added to it, of shape [batch, tokens, width] = {expected}, "
                f"got {list(hidden.shape)}" + (", several streams at once" if hidden.ndim == 4 else ""),
            )

    def _forward(
        self, module: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
    ) -> Any:
        if position_ids is None:
            places = {"attention_mask": to_device(attention_mask.long(), self.device)}
        else:  # transformers makes the mask, with the model's sliding windows, of positions that come without one
            places = {"position_ids": to_device(position_ids, self.device)}
        real = attention_mask.to(input_ids.device, torch.bool)
        outside = input_ids >= self._n_embeddings
        if (outside & real).any():
            raise FastsaeError(
                f"token id {int(input_ids[outside & real][0])} is outside of the model's embedding, which has "
                f"{self._n_embeddings} rows: tokens were added to the tokenizer alone. Enlarge the embedding with "
                "`model.resize_token_embeddings(len(tokenizer))`, or take the model's own tokenizer"
            )
        try:
            return module(
                input_ids=to_device(input_ids.masked_fill(outside, 0), self.device),
                use_cache=False,
                return_dict=True,
                **places,
            )
        except torch.OutOfMemoryError as error:
            raise FastsaeError(
                f"the language model ran out of memory on {real.shape[0]} dialogues of up to {real.shape[1]} tokens. Try a "
                "lower --forward-tokens, a lower --max-length, or --model-dtype bfloat16"
            ) from error

    def checked(self, acts: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return `acts` if they are [B, T, d_in] and finite on real tokens.

        Raises:
            UsageError: They have another shape.
            FastsaeError: An activation of a real token is NaN or infinite.
        """
        self.check_shape(acts, input_ids)
        if torch.isfinite(acts).all():
            return acts
        bad = ~torch.isfinite(acts).all(dim=-1)[attention_mask.to(acts.device, torch.bool)]
        if bad.any():
            raise FastsaeError(
                f"layer {self.layer}: the activations of {100 * bad.float().mean().item():.3g} % of the tokens are "
                f"NaN or infinite, computed in {str(acts.dtype).removeprefix('torch.')}. Try --model-dtype float32 or "
                "bfloat16, which hold larger values than float16, or an earlier layer; if it stays, the weights are bad"
            )
        return acts


def read_layers(residuals: Sequence[ResidualStream], *arguments: Tensor) -> list[Tensor]:
    """Return the activations [B, T, d_in] of several places in one model, computed once up to the deepest of them.

    Args:
        residuals: Different places in one model, in any order, which is that of the result.
        arguments: As for `ResidualStream`.

    Raises:
        UsageError: The blocks of this model return something else.
        FastsaeError: An activation of a real token is NaN or infinite, or a token has no embedding.
    """
    deepest = max(residuals, key=lambda residual: (residual.layer, HOOKS.index(residual.place.hook)))
    found: dict[Place, Tensor] = {}

    def keep(residual: ResidualStream, hidden: Tensor) -> Tensor:
        found[residual.place] = hidden.clone()  # the next block may write there
        return hidden

    with ExitStack() as stack:
        for residual in residuals:
            if residual is not deepest:
                stack.enter_context(residual.changed(partial(keep, residual)))
        found[deepest.place] = deepest(*arguments)
    for residual in residuals:
        if residual is not deepest:  # which has checked its own
            residual.checked(found[residual.place], *arguments[:2])
    return [found[residual.place] for residual in residuals]


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Carries the activations out of the forward pass and ends it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
