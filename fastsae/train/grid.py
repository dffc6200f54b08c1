"""Several SAEs in one run: the options that each may have of its own, and the grids and files that list them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastsae.errors import FastsaeError, UsageError, shown
from fastsae.train.config import TrainConfig

# What the stream of activations decides, and the loop over its batches: the same for all SAEs.
_SHARED_GROUPS, _ALSO_SHARED, _NOT_SHARED = (
    ("data", "running", "processes"),
    ("tokens", "batch_size"),
    ("layer", "seed"),
)
OF_ONE_SAE = tuple(
    f.name
    for f in fields(TrainConfig)
    if f.name in _NOT_SHARED or not (f.metadata["group"] in _SHARED_GROUPS or f.name in _ALSO_SHARED)
)
PLURALS = {"layers": "layer", "seeds": "seed", "architectures": "architecture"}
MOST = 1000  # SAEs of one run
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)


def expand(common: Mapping[str, Any], varied: Mapping[str, Sequence[Any]]) -> dict[str, TrainConfig]:
    """Returns the config of every combination of the varied options, under a name made of their values.

    A seed that varies draws other weights; all SAEs see the same tokens in the order of `data_seed`, by default the first
    of the seeds.

    Args:
        common: Options that all SAEs share.
        varied: Options with several values each.

    Raises:
        UsageError: An option cannot vary within one stream, a value is there twice, there are too many combinations, or a
            combination is no valid config.
    """
    for name, values in varied.items():
        if name not in OF_ONE_SAE:
            raise UsageError(
                f"{name}: expected one value, as all SAEs of a run share its stream of activations, got {len(values)}"
            )
        if len(set(values)) < len(values):
            raise UsageError(f"{name}: expected different values, got {', '.join(map(str, values))}")
    names, combinations = list(varied), list(itertools.product(*varied.values()))
    if len(combinations) > MOST:
        raise UsageError(f"{names[0]}: expected at most {MOST:,} SAEs in one run, got {len(combinations):,}")
    runs = {
        "-".join(f"{name}-{value}" for name, value in zip(names, values, strict=True)).replace("_", "-"): {
            **common,
            **dict(zip(names, values, strict=True)),
        }
        for values in combinations
    }
    return with_one_order({name: TrainConfig(**options) for name, options in runs.items()})


def read_spec(
    path: Path, preset: Mapping[str, Any], given: Mapping[str, Any], parse: Callable[[str, str], Any]
) -> dict[str, TrainConfig]:
    """Reads a JSON or YAML file that lists SAEs: `{"common": {option: value}, "saes": {name: {option: value}}}`.

    Args:
        path: The file. Options are named as in a run's config.json.
        preset: Options that stand where the file says nothing.
        given: Options of the command line, which stand over those under `common`.
        parse: Reads the value of an option from a text: YAML takes 1e-3 for one.

    Raises:
        UsageError: There is no such file, or it has an unknown key, an option that the stream decides, or a bad name.
        FastsaeError: It is neither JSON nor YAML.
    """
    spec = _read(path)
    if not isinstance(spec, dict) or not set(spec) <= {"common", "saes"} or not isinstance(spec.get("saes"), dict):
        found = ", ".join(map(shown, spec)) if isinstance(spec, dict) else type(spec).__name__
        raise UsageError(f'{path}: expected {{"common": {{...}}, "saes": {{name: {{...}}}}}}, got {found}')
    every = tuple(f.name for f in fields(TrainConfig))
    shared = _options(spec.get("common", {}), f"{path}: common", every, parse)
    runs = {}
    for name, own in spec["saes"].items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"{path}: expected names of letters, digits, '.', '_', '+' and '-', got {shown(name)}")
        runs[name] = {**preset, **shared, **given, **_options(own, f"{path}: {name}", OF_ONE_SAE, parse)}
    if not 1 <= len(runs) <= MOST:
        raise UsageError(f"{path}: expected 1 to {MOST:,} SAEs, got {len(runs):,}")
    if len({name.lower() for name in runs}) < len(runs):
        raise UsageError(f"{path}: expected names that differ by more than upper and lower case")
    return with_one_order({name: TrainConfig(**options) for name, options in runs.items()})


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UsageError(f"--spec: expected a file, there is none at {path}") from None
    except ValueError as error:
        raise FastsaeError(f"{path}: expected a text in UTF-8 ({error})") from None
    is_yaml = path.suffix in (".yaml", ".yml")
    try:
        return _yaml(text) if is_yaml else json.loads(text, object_pairs_hook=_without_repeats)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        kind = "YAML" if is_yaml else "JSON (or YAML in a .yaml file)"
        raise FastsaeError(f"{path}: expected {kind}, got something else ({' '.join(str(error).split())})") from None


def _yaml(text: str) -> Any:
    import yaml  # comes with huggingface_hub

    class Loader(yaml.SafeLoader):
        """Takes no name twice, of which YAML keeps the last."""

    def mapping(loader: Any, node: Any) -> Any:
        _check_names([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def with_one_order(runs: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The configs with one `data_seed`, so that all see the same tokens: that of the first, or its seed."""
    first = next(iter(runs.values()))
    order = first.seed if first.data_seed is None else first.data_seed
    return {name: replace(config, data_seed=order) for name, config in runs.items()}


def _options(found: Any, place: str, allowed: Sequence[str], parse: Callable[[str, str], Any]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UsageError(f"{place}: expected an object of options, got {type(found).__name__}")
    every = {f.name for f in fields(TrainConfig)}
    for name in found:
        if name in every and name not in allowed:
            raise UsageError(f'{place}: {name} belongs under "common", as all SAEs of a run share it')
        if name not in every:
            raise UsageError(f"{place}: expected options of a run, as its config.json names them, got {shown(name)}")
    return {name: parse(name, value) if isinstance(value, str) else value for name, value in found.items()}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_names([name for name, _ in pairs])
    return dict(pairs)


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UsageError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
