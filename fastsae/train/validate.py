"""Whether the values of the options make sense, each by itself and all together; nothing here imports torch."""

from __future__ import annotations

import json
import os
import re
import types
import unicodedata
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fastsae.errors import UsageError, shown

if TYPE_CHECKING:
    from fastsae.train.config import TrainConfig

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes of a name and of a path that file systems take
DEVICES = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?", re.ASCII)


class Kind(NamedTuple):
    """The type of an option: int, float, str or bool; the values to choose from, if any; whether None is allowed."""

    of: type
    choices: tuple[str, ...]
    is_optional: bool


def option_kinds(config_class: type[TrainConfig]) -> dict[str, Kind]:
    """The kind of each option, by its name."""
    return {name: _kind(hint) for name, hint in get_type_hints(config_class).items()}


def _kind(hint: Any) -> Kind:
    if get_origin(hint) in (types.UnionType, Union):
        (inner,) = (part for part in get_args(hint) if part is not type(None))
        return _kind(inner)._replace(is_optional=True)
    if get_origin(hint) is Literal:
        return Kind(str, get_args(hint), False)
    return Kind(hint, (), False)


def validate(config: TrainConfig) -> None:
    """Checks every option, then those that depend on each other.

    Raises:
        UsageError: A value has the wrong type, is out of its range, or contradicts another one.
    """
    kinds = option_kinds(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None and kinds[f.name].is_optional:
            continue
        _require(f.name, value, _problem(value, kinds[f.name], f.metadata["bounds"]))
    for name in ("model", "dataset", "split", "text", "activations", "init_from"):
        value = getattr(config, name)
        _require(name, value, "" if value is None else name_problem(value))
    _require("device", config.device, "" if DEVICES.fullmatch(config.device) else "auto, cpu, cuda or cuda:N")
    _validate_together(config)


def _require(name: str, value: Any, expected: str) -> None:
    if expected:
        raise UsageError(f"{name}: expected {expected}, got {shown(value)}")


def _problem(value: Any, kind: Kind, bounds: tuple[float, float] | None) -> str:
    """What was expected instead of `value`; empty where it is right."""
    if kind.choices:
        return "" if isinstance(value, str) and value in kind.choices else " or ".join(kind.choices)
    if kind.of in (bool, str):
        expected = {bool: "true or false", str: "text"}[kind.of]
        return "" if isinstance(value, kind.of) else expected
    is_number = isinstance(value, int if kind.of is int else int | float) and not isinstance(value, bool)
    assert bounds is not None
    low, high = bounds
    if is_number and low <= value <= high:  # False for NaN
        return ""
    return f"a {'whole ' if kind.of is int else ''}number from {shown(low)} to {shown(high)}"


def name_problem(text: str) -> str:
    """What was expected instead of `text` as the name of a file, a model, a dataset or a split; empty where it is right."""
    try:
        lengths = [len(os.fsencode(part)) for part in text.split("/")]
    except UnicodeEncodeError:
        return "a name that the system's encoding has"
    if not text or any(unicodedata.category(character) == "Cc" for character in text):
        return "a name that is not empty and has no control characters"
    if max(lengths) > LONGEST_NAME or sum(lengths) + len(lengths) > LONGEST_PATH:
        return f"a name of at most {LONGEST_NAME} bytes, or a path of at most {LONGEST_PATH}"
    if text.startswith("~") and os.path.expanduser(text).startswith("~"):
        return "a path in the home folder of a user of this system"
    return ""


def model_options(text: str | None) -> dict[str, Any]:
    """The arguments that `model_kwargs` holds as JSON.

    Raises:
        UsageError: It is not JSON, or no object.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f'model_kwargs: expected a JSON object such as {{"revision": "main"}}, got {shown(text)}')
    return found


def _validate_together(config: TrainConfig) -> None:
    model_options(config.model_kwargs)
    if config.warm_up + config.decay > 1:
        raise UsageError(
            f"warm_up: expected at most 1 together with --decay, got {config.warm_up:g} + {config.decay:g}"
        )
    if config.log_threshold and config.init_threshold == 0:
        raise UsageError("init_threshold: expected a number above 0 with --log-threshold, got 0")
    if config.is_topk and config.k is None:
        raise UsageError(
            f"k: expected the number of active features per token, which --architecture {config.architecture} needs, got none"
        )
    if config.d_sae is not None and config.k is not None and config.k > config.d_sae:
        raise UsageError(f"k: expected at most --d-sae = {config.d_sae:,}, got {config.k:,}")
    if config.buffer_tokens < 2 * config.batch_size:
        raise UsageError(
            f"buffer_tokens: expected at least twice --batch-size = {config.batch_size:,}, got {config.buffer_tokens:,}"
        )
    if config.keep_checkpoints is not None and config.checkpoint_every == 0:
        raise UsageError(
            f"keep_checkpoints: expected --checkpoint-every above 0, which writes them, got {config.keep_checkpoints} with 0"
        )
    if config.tokens < config.batch_size:
        raise UsageError(f"tokens: expected at least one --batch-size = {config.batch_size:,}, got {config.tokens:,}")
