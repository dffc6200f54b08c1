"""Checks the state of a checkpoint, value by value, before any of it is used."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastsae.data.buffer import ActivationBatch, MixingBuffer
from fastsae.data.stream import ActivationStream
from fastsae.errors import UsageError, shown
from fastsae.fields import DTYPES, Fields
from fastsae.train.trainer import Trainer

LARGEST = 2**62  # the largest count
# numbers of a curve: of batches without variance, and of a resumed run that has computed nothing yet
MAY_BE_UNKNOWN = ("fvu", "model_tokens_per_second", "sae_tokens_per_second")
ROW = tuple(field.name for field in fields(ActivationBatch))


def check_alike(found: Fields, like: dict[str, Any]) -> None:
    """Raises ValueError unless `found` has the names of `like`, and values of the same kinds.

    Numbers are finite, integers not negative; tensors have the same shape and dtype; an empty dict stands for counts by
    name.
    """
    found.check_names(like)
    for name, value in like.items():
        if isinstance(value, Tensor):
            found.tensor(name, tuple(value.shape), (value.dtype,))
        elif isinstance(value, bool):
            found.boolean(name)
        elif isinstance(value, int):
            found.integer(name, 0, LARGEST)
        elif isinstance(value, float):
            found.number(name)
        elif isinstance(value, dict):
            inner = found.fields(name)
            check_alike(inner, value or dict.fromkeys(inner.values, 0))


def check_options(found: Fields, options: dict[str, Any]) -> None:
    """Raises UsageError unless the checkpoint was made with the `options` of its run: config.json can be edited.

    Raises:
        ValueError: `found` are no options.
    """
    found.check_names(options)
    for name, value in options.items():
        made_with = found.get(name)
        if made_with != value:
            raise UsageError(
                f"{name}: the run's checkpoint was made with {shown(made_with)}, but its config.json says {shown(value)}; "
                "put that back, or start a new run"
            )


def check_trainer(found: Fields, trainer: Trainer) -> None:
    """Raises ValueError unless `found` is a state of `trainer`."""
    config, sae = trainer.config, trainer.sae
    like = trainer.state_dict()
    found.check_names(like)
    step = found.integer("step", 0, config.steps)
    found.number("scale", 0, above=True)
    found.tensor("silent_tokens", (sae.d_sae,), (torch.int64,))
    _check_range(found, "silent_tokens", 0, step * config.batch_size)
    found.tensor("dead_mask", (None,), (torch.bool,))
    if len(found.get("dead_mask")) not in (0, sae.d_sae):
        raise found.wrong("dead_mask", f"a tensor bool [0] or [{sae.d_sae}]")
    _check_optimizer(found.fields("optimizer"), trainer, step)
    last = _check_history(found, config.batch_size, step)
    sums = found.fields("sums")
    for name in dict.fromkeys([*sums.values, *(("loss", "l0", "fvu", "fvu_steps") if last < step else ())]):
        sums.tensor(name, (), (torch.float32,))
    own = ("step", "scale", "silent_tokens", "dead_mask", "optimizer", "history", "sums")
    others = {name: value for name, value in like.items() if name not in own}
    check_alike(Fields({name: found.values.get(name) for name in others}, found.place), others)


def _check_optimizer(found: Fields, trainer: Trainer, step: int) -> None:
    every = trainer.optimizer.param_groups[0]["params"]
    parameters = {str(i): p for i, p in enumerate(every) if p.requires_grad}
    found.check_names(parameters)
    for name, parameter in parameters.items() if step else ():
        moments = found.fields(name)
        moments.check_names(("step", "exp_avg", "exp_avg_sq"))
        moments.tensor("step", (), (torch.float32,))
        if moments.get("step") != step:
            raise ValueError(f"{moments.place}step: expected {step}, got {moments.get('step').item():g}")
        for moment in ("exp_avg", "exp_avg_sq"):
            moments.tensor(moment, tuple(parameter.shape), (parameter.dtype,))
        _check_range(moments, "exp_avg_sq", 0)


def _check_history(found: Fields, batch_size: int, step: int) -> int:
    """The last step of the curves."""
    rows = found.get("history")
    if not isinstance(rows, list):
        raise found.wrong("history", "a list")
    last = 0
    for i, row in enumerate(rows):
        point = Fields(row, f"{found.place}history.{i}.")
        last = point.integer("step", last + 1, step)
        point.integer("tokens", last * batch_size, last * batch_size)
        for name in dict.fromkeys(("loss", "l0", "fvu", "lr", "dead_share", "tokens_per_second", *point.values)):
            if name in MAY_BE_UNKNOWN:
                point.number(name, default=None)
            else:
                point.number(name)
    return last


def check_stream(found: Fields, stream: ActivationStream) -> None:
    """Raises ValueError unless `found` is a state of `stream`."""
    found.fields("sequencer").fields("at").values.setdefault("parts", 1)  # earlier versions did not write it
    check_alike(found, stream.state_dict())
    found.number("median_norm", 0)


def check_buffer(found: Fields, buffer: MixingBuffer, d_in: int, n_dialogues: int) -> None:
    """Raises ValueError unless `found` is a state of `buffer`."""
    like = buffer.state_dict()
    found.check_names(like)
    n_rows = _check_rows(found.fields("rows"), d_in, n_dialogues, buffer.capacity)
    if found.get("pending") is not None:
        _check_rows(found.fields("pending"), d_in, n_dialogues, None)
    found.integer("to_serve", 0, n_rows)
    found.boolean("served_any")
    found.integer("taken", n_rows, LARGEST)
    state = found.tensor("generator", tuple(like["generator"].shape), (torch.uint8,))
    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        raise ValueError(f"{found.place}generator: expected the state of a generator, got other bytes") from None


def _check_rows(found: Fields, d_in: int, n_dialogues: int, most: int | None) -> int:
    found.check_names(ROW)
    acts = found.tensor("acts", (None, d_in), tuple(DTYPES.values()))
    if most is not None and len(acts) > most:
        raise found.wrong("acts", f"at most {most} rows")
    for name, end in (("token_ids", LARGEST), ("positions", LARGEST), ("dialogue_ids", n_dialogues - 1)):
        found.tensor(name, (len(acts),), (torch.int64,))
        _check_range(found, name, 0, end)
    return len(acts)


def _check_range(found: Fields, name: str, low: int, high: int | None = None) -> None:
    tensor = found.get(name)
    if tensor.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in tensor.aminmax())
    if lowest < low or (high is not None and highest > high):
        bounds = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{found.place}{name}: expected numbers {bounds}, got {lowest:g} to {highest:g}")
