"""`fastsae train`: a run of one SAE, or of several on one stream of activations."""

from __future__ import annotations

import argparse
import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsae.commands import plan
from fastsae.disk import local_path
from fastsae.environment import is_first, is_restart
from fastsae.errors import FastsaeError, UsageError, shown
from fastsae.flags import (
    Commands,
    Several,
    add_config_flags,
    check_dataset,
    flag,
    given_options,
    parsed,
    path,
    without_effect,
)
from fastsae.summary import cost, print_summary, print_table
from fastsae.train.config import TrainConfig
from fastsae.train.grid import OF_ONE_SAE
from fastsae.train.presets import PRESETS
from fastsae.train.validate import name_problem

log = logging.getLogger("fastsae")


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "train",
        help="train an SAE on a chat model, each dialogue whole (the FAST method)",
        description="Trains, evaluates and saves an SAE. Without arguments: the embedded demo, a few minutes on a CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=path, metavar="FOLDER", help="new folder for the results (default: sae-MODEL)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --output; give --model and --dataset again where they have moved",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="set of options: recommended, or fast-paper, those of arXiv:2506.07691"
    )
    parser.add_argument(
        "--spec",
        type=path,
        metavar="FILE",
        help='several SAEs on one stream of activations: a JSON or YAML file {"common": {...}, "saes": {NAME: {...}}} with '
        "options named as in config.json; a grid needs no file: --layers 4,8 --target-l0 16,32,64 --seeds 0,1",
    )
    parser.add_argument(
        "--pages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="at the end write features.html: where features fire, and what they do to the logits; not for several SAEs",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    plan.add_flags(parser)
    add_config_flags(parser, several=[name for name in OF_ONE_SAE if name != "init_from"])


def run(arguments: Namespace) -> None:
    """Runs the command."""
    from fastsae.interpret.run import PAGE_FILE
    from fastsae.train.folder import REPORT_FILE, is_complete, is_new
    from fastsae.train.run import train, train_many
    from fastsae.train.trainer import SAE_CLASSES

    plan.check_flags(arguments)
    given = given_options(arguments)
    configs, output = _resumed(arguments, given) or _new(arguments, given)
    for config in configs.values():
        if unused := without_effect(config, given):
            log.warning("without effect on a %s run: %s", config.architecture, ", ".join(map(flag, unused)))
    if arguments.dry_run:
        plan.run(arguments, list(configs.values()))
        return
    # torchrun starts all processes again when one of them has failed: they go on with what was saved
    if is_restart() and is_complete(output):  # a process was killed after its run had ended
        if is_first():
            log.info("the run in %s is complete", output)
        return
    resume = arguments.resume or (is_restart() and not is_new(output))
    options: dict[str, Any] = {"resume": resume, "progress": not arguments.quiet}
    if "" not in configs:
        metrics = train_many(configs, output, **options)
        if is_first():
            print_table(metrics, output)
        return
    metrics = train(configs[""], output, pages=arguments.pages, **options)
    if not is_first():
        return
    print(f"\n{output}: {cost([metrics])}")
    print_summary(metrics)
    name = SAE_CLASSES[configs[""].architecture].__name__
    pages = f"\npage     {output / PAGE_FILE}" if (output / PAGE_FILE).exists() else ""
    if arguments.pages and configs[""].shard_features > 1:  # which no process has loaded whole
        pages = f"\npage     fastsae pages {output}  writes it"
    print(f"\nreport   {output / REPORT_FILE}{pages}\nload it  fastsae.{name}.load({str(output)!r})")


def _resumed(arguments: Namespace, given: dict[str, Any]) -> tuple[dict[str, TrainConfig], Path] | None:
    """The options of the interrupted run in `--output`; None for a run that starts from the beginning."""
    from fastsae.train.folder import CONFIG_FILE, is_new, read_configs

    if not arguments.resume:
        return None
    if arguments.output is None:
        raise UsageError("--resume: expected --output with the folder of the interrupted run")
    if not arguments.output.is_dir() or is_new(arguments.output):
        if not (given or arguments.preset or arguments.spec):
            raise UsageError(
                f"--resume: the run in {arguments.output} ended before it wrote {CONFIG_FILE}; start it again with its options"
            )
        return None
    if arguments.preset is not None:
        raise UsageError("--preset: a resumed run keeps the options it was started with; drop the flag")
    if arguments.spec is not None or any(isinstance(value, Several) for value in given.values()):
        raise UsageError("--resume: a run of several SAEs keeps the options it was started with; drop --spec and lists")
    return {name: replace(config, **given) for name, config in read_configs(arguments.output).items()}, arguments.output


def _new(arguments: Namespace, given: dict[str, Any]) -> tuple[dict[str, TrainConfig], Path]:
    """The options of a run that starts from the beginning, and its folder."""
    from fastsae.train.grid import expand, read_spec

    preset = PRESETS[arguments.preset or "recommended"]
    if given.get("activations") is not None:
        from fastsae.train.caching import options_of

        preset = {**preset, **options_of(local_path(given["activations"]))}
    if given.get("init_from") is not None:
        folder, of_the_sae = _source(given["init_from"])
        given, preset = {**given, "init_from": str(folder)}, {**preset, **of_the_sae}
    varied = {name: value for name, value in given.items() if isinstance(value, Several)}
    common = {name: value for name, value in given.items() if name not in varied}
    if arguments.spec is not None:
        if varied:
            raise UsageError(
                f"--spec: expected no lists of values beside a file of SAEs, got {flag(next(iter(varied)))}"
            )
        configs = read_spec(arguments.spec, preset, common, parsed)
    elif varied:
        configs = expand({**preset, **common}, varied)
    else:
        configs = {"": TrainConfig(**{**preset, **common})}
    first = next(iter(configs.values()))
    if first.text is not None and first.dataset == "demo":
        check_dataset({**preset, **given})
    layer = "" if first.layer is None or "layer" in varied or arguments.spec else f"-layer{first.layer}"
    name = local_path(first.model).resolve().name  # resolved, because `.` has no name
    return configs, arguments.output or Path(f"sae{'' if '' in configs else 's'}-{name}{layer}")


def _source(name: str) -> tuple[Path, dict[str, Any]]:
    """Where the SAE is that training goes on from, and the options that follow from it."""
    from fastsae.peers import formats
    from fastsae.train.evaluation import load_sae
    from fastsae.train.init_from import options_of

    if problem := name_problem(name):
        raise UsageError(f"init_from: expected {problem}, got {shown(name)}")
    try:
        folder = formats.find(name, formats.wanted_files())
        return folder, options_of(load_sae(folder))
    except FastsaeError as error:
        raise type(error)(f"init_from: {error}") from None
