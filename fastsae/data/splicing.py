"""A model with the activations of one place replaced, and the proof on one dialogue that this is done rightly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.data.activations import ResidualStream, decoder_layers, read_layers, text_config, unsupported
from fastsae.data.hooks import HOOKS
from fastsae.errors import FastsaeError, UsageError

_CHECKED_TOKENS = 64  # tokens of one dialogue, whose passes take milliseconds
# Largest difference between two orders of the same sums, as a share of the largest logit or of a token's activation. What
# is really wrong (a missing input, another token's activation) changes either by its own size.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class SplicedModel:
    """Logits of a model, clean and with the activations of one place replaced, without repeated work.

    The blocks before the place are skipped in a spliced pass where that changes nothing. It would in models whose
    blocks hand on more than the residual stream (keys and values, a router's state), where they all run. `check` finds out
    which kind of model it is, once for each `ResidualStream`; the first clean pass calls it where nobody did.
    """

    def __init__(self, residual: ResidualStream) -> None:
        self.residual = residual
        n_before = residual.layer + (residual.place.hook == "resid_post")
        self._blocks: list[nn.Module] = list(decoder_layers(residual.model)[:n_before])
        self._replaces_the_stream = residual.place.hook in ("resid_pre", "resid_post")
        self._stream: Tensor | None = None  # behind the skipped blocks, where it is not what is replaced
        self._other_outputs: tuple[Any, ...] | None = None
        self._tolerance = TOLERANCE.get(residual.model.get_input_embeddings().weight.dtype, 1e-1)

    def clean(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the activations `[B, T, d_in]` and the logits `[B, T, vocabulary]` of one ordinary pass."""
        if self.residual.blocks_can_be_skipped is None:
            self.check(input_ids[:1], attention_mask[:1])
        hidden, logits = self._pass(input_ids, attention_mask)
        return hidden[-1], logits

    def spliced(self, input_ids: Tensor, attention_mask: Tensor, hidden: Tensor) -> Tensor:
        """Returns the logits `[B, T, vocabulary]` with `hidden` `[B, T, d_in]` as the activations.

        `clean` was called before, with the same tokens.
        """
        if not self.residual.blocks_can_be_skipped:
            return self.residual.splice(input_ids, attention_mask, lambda _: hidden)
        stream = hidden if self._stream is None else self._stream
        output = stream if self._other_outputs is None else (stream, *self._other_outputs)
        with _returning(self._blocks, output):
            if self._replaces_the_stream:
                return self.residual.logits(input_ids, attention_mask)
            return self.residual.splice(input_ids, attention_mask, lambda _: hidden)

    @torch.no_grad()
    def check(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Proves on one dialogue that this model is read and spliced rightly, and whether blocks may be skipped.

        The model's own activations, spliced in, must leave its logits as they are, and the activations of a token must not
        depend on what stands behind it. Leaves the state of random number generators alone.

        Args:
            input_ids: `[1, T]`, of which at most 64 tokens are used.
            attention_mask: `[1, T]`.

        Raises:
            UsageError: The model fails the test; the message names its type and what is wrong.
            FastsaeError: Its activations or logits are NaN or infinite.
        """
        input_ids = input_ids[:, : min(_CHECKED_TOKENS, max(1, int(attention_mask[0].sum())))].cpu()
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        devices = [self.residual.device] if self.residual.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            read = self.residual(input_ids, mask)  # checks the shape
            found, logits = self._pass(input_ids, mask)
            check_logits(logits, mask)
            self._check_reading(found, read)
            self._check_order(input_ids, read)
            if not self._replaces_the_stream:
                self._check_parts(input_ids, mask)
            self._check_splicing(input_ids, mask, read, logits)

    def _pass(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """The activations `[B, T, d_in]`, one for each time the model came there, and the logits of an ordinary pass."""
        with self.reading() as hidden:
            return hidden, self.residual.logits(input_ids, attention_mask)

    @contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """While this lasts, the activations `[B, T, d_in]` are added to the list."""
        found: list[Tensor] = []

        def read(hidden: Tensor) -> Tensor:
            found.append(hidden.clone())  # a later block may change its input in place
            return hidden

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            self._other_outputs = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
            if not self._replaces_the_stream:
                self._stream = self.residual.hidden_states(output).clone()

        handles = [block.register_forward_hook(leave) for block in self._blocks[-1:]]
        try:
            with self.residual.changed(read):
                yield found
        finally:
            for handle in handles:
                handle.remove()

    def _check_reading(self, found: list[Tensor], read: Tensor) -> None:
        if len(found) != 1:
            raise self._unsupported(f"it ran {len(found)} times in a pass over the tokens, expected once")
        if token_difference(found[0], read) > self._tolerance:
            raise self._unsupported("its output is another one when the later blocks do not run")

    def _check_order(self, input_ids: Tensor, read: Tensor) -> None:
        """Runs the dialogue beside its first half, which is padded: neither padding nor later tokens may show."""
        half = max(1, input_ids.shape[1] // 2)
        both, mask = input_ids.repeat(2, 1), torch.ones(2, input_ids.shape[1], dtype=torch.bool)
        both[1, half:], mask[1, half:] = 0, False
        acts = self.residual(both, mask)
        difference = max(token_difference(acts[0], read[0]), token_difference(acts[1, :half], read[0, :half]))
        if difference > self._tolerance:
            raise self._unsupported(
                "the activations of its tokens depend on the tokens or the padding behind them (they differ by "
                f"{difference:.1%}), expected a model that reads from left to right and heeds the attention mask"
            )

    def _check_parts(self, input_ids: Tensor, mask: Tensor) -> None:
        """The block must add to the stream what its attention and its MLP give, and nothing else."""
        residual = self.residual
        places = [ResidualStream(residual.model, residual.layer, hook) for hook in HOOKS]
        before, attention, mlp, after = (acts.double() for acts in read_layers(places, input_ids, mask))
        factor = getattr(text_config(residual.model.config), "residual_multiplier", None) or 1.0
        added = factor * (attention + mlp)
        # the stream is rounded to its own size, beside which what is added may be small
        rounding = (
            4
            * torch.finfo(residual.model.dtype).eps
            * float((after.norm(dim=-1) / added.norm(dim=-1).clamp_min(1e-30)).median())
        )
        difference = token_difference(after - before, added)
        if not difference <= self._tolerance + rounding:
            raise UsageError(
                f"hook: expected for {residual.place.hook} a model whose blocks add the outputs of attention and MLP to the "
                f"residual stream, got {type(residual.model).__name__}, whose block {residual.layer} adds something else "
                f"(it differs by {difference:.0%}); take resid_post or resid_pre"
            )

    def _check_splicing(self, input_ids: Tensor, mask: Tensor, hidden: Tensor, logits: Tensor) -> None:
        self.residual.blocks_can_be_skipped = False
        whole = _difference(self.spliced(input_ids, mask, hidden.clone()), logits)
        if not whole <= self._tolerance:
            raise self._unsupported(
                f"splicing its own output in changes the logits by {whole:.1%} of the largest, expected no change"
            )
        if not self._blocks:
            return
        self.residual.blocks_can_be_skipped = True
        try:
            skipping = _difference(self.spliced(input_ids, mask, hidden.clone()), logits)
        except Exception:  # a later block misses what a skipped one should have left, in whatever form
            skipping = float("inf")
        # both are 0 where sums have one order; a GPU may add in any
        self.residual.blocks_can_be_skipped = skipping <= whole

    def _unsupported(self, reason: str) -> UsageError:
        place = self.residual.place
        of = "" if place.hook == "resid_post" else f" ({place.hook})"
        return unsupported(self.residual.model, f"decoder block {place.layer}{of}: {reason}")


def check_logits(logits: Tensor, attention_mask: Tensor) -> None:
    """Raises FastsaeError where a model's own logits `[B, T, vocabulary]` at a real token are NaN, or all of them infinite."""
    if not torch.isfinite(logits.amax(-1)[attention_mask.to(logits.device)]).all():  # -inf for some words is fine
        raise FastsaeError(
            "the language model's own logits hold NaN or Inf although this layer does not: a later layer is broken. "
            "Get the model's files again, or try --model-dtype float32"
        )


def token_difference(a: Tensor, b: Tensor) -> float:
    """The relative difference of the activations of a token, as the median over tokens.

    The median, because a mixture of experts may send single tokens elsewhere for a difference in the last digit.
    """
    a, b = a.double().flatten(0, -2), b.double().flatten(0, -2)
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).median())


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of logits, as a share of the largest finite one of `b`; equal infinities are equal."""
    apart = torch.where(a == b, 0, (a - b).abs()).amax()
    return float(apart / b.abs().where(b.isfinite(), 0).amax().clamp_min(1e-30))


@contextmanager
def _returning(blocks: list[nn.Module], output: Any) -> Iterator[None]:
    """Lets each block return `output` at once, whatever its arguments."""
    before = [block.__dict__.get("forward") for block in blocks]  # set where another library wrapped the block
    for block in blocks:
        block.__dict__["forward"] = lambda *_args, **_options: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward
