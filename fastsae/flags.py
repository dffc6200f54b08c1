"""The flags of the command line: one for each option of a run, and paths; a wrong value is named with what was expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from fastsae.disk import local_path
from fastsae.errors import UsageError, shown
from fastsae.train.config import TrainConfig
from fastsae.train.grid import PLURALS
from fastsae.train.validate import Kind, name_problem, option_kinds

GROUPS = {
    "data": "data and language model",
    "sae": "sparse autoencoder",
    "training": "training",
    "running": "running",
    "processes": "several processes, started by torchrun",
}
METAVARS = {int: "N", float: "X", str: "NAME"}
OPTIONS = {f.name: f for f in fields(TrainConfig)}
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def flag(name: str) -> str:
    """The flag of an option: `--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


class Several(tuple):
    """The values of a flag that were given as a list, one for each SAE."""


def add_config_flags(
    parser: argparse.ArgumentParser, names: Sequence[str] = tuple(OPTIONS), several: Sequence[str] = ()
) -> None:
    """One flag per option in `names`; absent flags stay absent, so that presets and saved configs show through.

    Args:
        parser: The command's.
        names: The options.
        several: Those that take several values as well, with commas between them.
    """
    kinds = option_kinds(TrainConfig)
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for name, option in OPTIONS.items():
        if name in names:
            settings = _settings(kinds[name], option.metadata["help"], option.default)
            if name in several and "type" in settings:
                settings["type"] = _one_or_several(settings["type"])
            flags = [
                flag(name),
                *(flag(plural) for plural, single in PLURALS.items() if single in several and single == name),
            ]
            groups[option.metadata["group"]].add_argument(*flags, dest=name, default=argparse.SUPPRESS, **settings)


def _settings(kind: Kind, text: str, default: Any) -> dict[str, Any]:
    if default is not None:
        text += f" [{default}]"
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kind.of is bool:
        return {**settings, "action": argparse.BooleanOptionalAction}
    metavar = "{" + ",".join(kind.choices) + "}" if kind.choices else METAVARS[kind.of]
    return {**settings, "type": _parser_of(kind), "metavar": metavar}


def _parser_of(kind: Kind) -> Callable[[str], Any]:
    """Turns the text of a flag into its value."""
    readers: dict[type, Callable[[str], Any]] = {int: whole_number, float: _number, str: str}
    read = readers[kind.of]

    def parse(text: str) -> Any:
        if kind.is_optional and text.lower() == "none":
            return None
        if kind.choices and text not in kind.choices:
            raise _wrong(" or ".join(kind.choices), text)
        return read(text)

    return parse


def _one_or_several(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: Several(map(parse, text.split(","))) if "," in text else parse(text)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a run that the command line gives."""
    return {name: value for name, value in vars(arguments).items() if name in OPTIONS}


def check_dataset(given: dict[str, Any]) -> None:
    """Raises UsageError where plain text comes without dialogues for the evaluation, and nobody has asked for the demo's."""
    if "dataset" not in given:
        raise UsageError(
            "--text: expected --dataset with dialogues for the evaluation, which reads whole dialogues, got none"
        )


def parsed(name: str, text: str) -> Any:
    """The value of an option from its text, as the command line reads it.

    Raises:
        UsageError: It is none.
    """
    try:
        return _parser_of(option_kinds(TrainConfig)[name])(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name}: {error}") from None


def whole_number(text: str) -> int:
    """`1500000`, `1_500_000` or `1.5e6`."""
    try:
        return int(text)
    except ValueError:
        number = _number(text, "a whole number")
    if not number.is_integer():
        raise _wrong("a whole number", text)
    return int(number)


def _number(text: str, expected: str = "a number") -> float:
    try:
        return float(text)
    except ValueError:
        raise _wrong(expected, text) from None


def path(text: str) -> Path:
    """A path, `~` as the home folder."""
    return local_path(place(text))


def place(text: str) -> str:
    """The name of a file, of a folder or on the hub."""
    if problem := name_problem(text):
        raise _wrong(problem, text)
    return text


def _wrong(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {shown(text)}")


def check_values(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program where Python 3.10 to 3.12 have made an empty list of the value `--`, without a look at its type."""
    for name, value in vars(arguments).items():
        if value == []:
            parser.error(f"argument {flag(name)}: expected a value, got '--'")


def as_flag(message: str) -> str:
    """A message that begins with an option's name, with the flag in its place."""
    name, _, rest = message.partition(" ")
    bare = name.removesuffix(":")
    return (
        f"{flag(bare)}{name[len(bare) :]} {rest}" if bare in OPTIONS and (name != bare or rest[:1] == "'") else message
    )


def without_effect(config: TrainConfig, given: Iterable[str]) -> list[str]:
    """Those of the given options that the run does not use."""
    unused = [
        name
        for name in given
        if config.architecture not in (OPTIONS[name].metadata["used_by"] or (config.architecture,))
    ]
    if "expansion" in given and config.d_sae is not None:
        unused.append("expansion")
    if config.init_from is not None:  # training starts with what the SAE has
        unused += [name for name in ("init_threshold", "b_dec_init", "init_l0") if name in given and name not in unused]
    if "target_l0" in given and config.expected_l0 is None:  # the given weight of the penalty decides
        unused.append("target_l0")
    return unused
