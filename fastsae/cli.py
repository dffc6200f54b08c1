"""The command line: `fastsae train`, `compare`, `cache`, `evaluate` and `convert`."""

from __future__ import annotations

import argparse
import errno
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsae.disk import local_path
from fastsae.environment import bound_product_caches
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory, shown
from fastsae.flags import (
    OPTIONS,
    Several,
    add_cache_command,
    add_compare_command,
    add_config_flags,
    add_convert_command,
    add_evaluate_command,
    as_flag,
    check_values,
    flag,
    parsed,
    path,
    without_effect,
)
from fastsae.imports import import_for_good
from fastsae.interrupt import exit_status, signals_end_the_command
from fastsae.summary import cost, print_difference, print_summary, print_table
from fastsae.terminal import tolerant_output
from fastsae.train.config import TrainConfig
from fastsae.train.grid import OF_ONE_SAE
from fastsae.train.presets import PRESETS
from fastsae.train.validate import name_problem
from fastsae.version import __version__

DESCRIPTION = """\
Sparse autoencoders (SAEs) for language models.

  fastsae train                       train on the embedded chat model and dialogues: no network, no GPU
  fastsae train --model Qwen/Qwen2.5-0.5B-Instruct --dataset HuggingFaceH4/ultrachat_200k --split train_sft \\
                --layer 12 --tokens 40000000
  fastsae train --architecture topk --k 32
  fastsae train --layers 2,3 --target-l0 16,32 --output grid     four SAEs for one pass of the model, each in its folder
  fastsae train --layer 3 --hook mlp_out     what the block's MLP adds to the residual stream
  fastsae train --init-from my-sae --lr 3e-4 --dataset chats.jsonl     train a saved SAE further
  fastsae train --output my-sae --resume     go on with an interrupted run
  fastsae train --model ./my-model --dataset chats.jsonl     rows like {"messages": [{"role": ..., "content": ...}]}
  fastsae cache acts --layers 2,3     write activations once, for fastsae train --activations acts
  fastsae train --model ./my-model --dataset chats.jsonl --text pile.jsonl --sequencing block     plain text, in blocks
  fastsae compare                     FAST against block training at matched sparsity, with controls and intervals
  fastsae evaluate my-sae             measure a saved SAE on held-out dialogues, of this or another library
  fastsae convert params.npz my-sae   turn another library's SAE into this one's files, or back with --to

Activation units: while training, activations are scaled to a mean norm of sqrt(d_in); options "in activation units" mean
that scale. Exit status: 0 done, 1 the run failed, 2 an argument is wrong, 130 interrupted (Ctrl-C), 143 ended by
SIGTERM; both write a checkpoint first, a second one ends at once.
"""
OUT_OF_MEMORY = (
    "there is not enough memory; lower --max-length (a dialogue of the evaluation is never cut further), --forward-tokens, "
    "--buffer-tokens, --batch-size, or --d-sae and --expansion, then run again, with --resume if training began and these "
    "options stay as they are"
)

log = logging.getLogger("fastsae")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fastsae", description=DESCRIPTION, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastsae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train an SAE on a chat model, each dialogue whole (the FAST method)",
        description="Trains, evaluates and saves an SAE. Without arguments: the embedded demo, a few minutes on a CPU.",
        allow_abbrev=False,
    )
    train.add_argument("--output", type=path, metavar="FOLDER", help="new folder for the results (default: sae-MODEL)")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --output; give --model and --dataset again where they have moved",
    )
    train.add_argument(
        "--preset", choices=PRESETS, help="set of options: recommended, or fast-paper, those of arXiv:2506.07691"
    )
    train.add_argument(
        "--spec",
        type=path,
        metavar="FILE",
        help='several SAEs on one stream of activations: a JSON or YAML file {"common": {...}, "saes": {NAME: {...}}} with '
        "options named as in config.json; a grid needs no file: --layers 4,8 --target-l0 16,32,64 --seeds 0,1",
    )
    train.add_argument("--quiet", action="store_true", help="show no progress bars")
    add_config_flags(train, several=[name for name in OF_ONE_SAE if name != "init_from"])

    add_compare_command(commands)
    add_cache_command(commands)
    add_evaluate_command(commands)
    add_convert_command(commands)
    return parser


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name in OPTIONS}


def command_train(arguments: argparse.Namespace) -> None:
    """`fastsae train`."""
    from fastsae.train.folder import REPORT_FILE
    from fastsae.train.run import train, train_many
    from fastsae.train.trainer import SAE_CLASSES

    given = _given(arguments)
    configs, output = _resumed(arguments, given) or _new(arguments, given)
    for config in configs.values():
        if unused := without_effect(config, given):
            log.warning("without effect on a %s run: %s", config.architecture, ", ".join(map(flag, unused)))
    options = {"resume": arguments.resume, "progress": not arguments.quiet}
    if "" not in configs:
        print_table(train_many(configs, output, **options), output)
        return
    metrics = train(configs[""], output, **options)
    print(f"\n{output}: {cost([metrics])}")
    print_summary(metrics)
    name = SAE_CLASSES[configs[""].architecture].__name__
    print(f"\nreport   {output / REPORT_FILE}\nload it  fastsae.{name}.load({str(output)!r})")


def _resumed(arguments: argparse.Namespace, given: dict[str, Any]) -> tuple[dict[str, TrainConfig], Path] | None:
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


def _new(arguments: argparse.Namespace, given: dict[str, Any]) -> tuple[dict[str, TrainConfig], Path]:
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


def command_compare(arguments: argparse.Namespace) -> None:
    """`fastsae compare`."""
    from fastsae.comparison.costs import estimate
    from fastsae.comparison.run import PAGE_FILE, carry_out, new_plan, saved_plan
    from fastsae.comparison.terminal import print_plan, print_result

    given = _given(arguments)
    seeds = given.pop("seed", None)
    if seeds is not None and not isinstance(seeds, Several):
        seeds = (seeds,)
    if arguments.resume and arguments.output is None:
        raise UsageError("--resume: expected --output with the folder of the interrupted comparison")
    name = local_path(given.get("model", "demo")).resolve().name
    output = arguments.output or Path(f"compare-{name}")
    resumed = arguments.resume
    plan = saved_plan(output, arguments.arms, seeds, given) if resumed else new_plan(arguments.arms, seeds, given)
    print_plan(plan, estimate(plan, progress=not arguments.quiet))
    if arguments.dry_run:
        return
    result = carry_out(plan, output, resume=resumed, progress=not arguments.quiet)
    print_result(result)
    print(f"\npage     {output / PAGE_FILE}")


def _source(name: str) -> tuple[Path, dict[str, Any]]:
    """Where the SAE is that training goes on from, and the options that follow from it."""
    from fastsae.peers import formats
    from fastsae.train.init_from import options_of
    from fastsae.train.run import load_sae

    if problem := name_problem(name):
        raise UsageError(f"init_from: expected {problem}, got {shown(name)}")
    try:
        folder = formats.find(name, formats.wanted_files())
        return folder, options_of(load_sae(folder))
    except FastsaeError as error:
        raise type(error)(f"init_from: {error}") from None


def check_dataset(given: dict[str, Any]) -> None:
    """Raises UsageError where plain text comes without dialogues for the evaluation, and nobody has asked for the demo's."""
    if "dataset" not in given:
        raise UsageError(
            "--text: expected --dataset with dialogues for the evaluation, which reads whole dialogues, got none"
        )


def command_cache(arguments: argparse.Namespace) -> None:
    """`fastsae cache`."""
    from fastsae.train.caching import cache_activations, options_of

    given = _given(arguments)
    layers = given.pop("layer", ())
    if arguments.resume:
        earlier = options_of(arguments.path)
        layers = layers or earlier.pop("layer", ())
        given = {**earlier, **given}
    if given.get("text") is not None:
        check_dataset(given)
    layers = [layers] if isinstance(layers, int) else list(layers)
    options = {"resume": arguments.resume, "progress": not arguments.quiet}
    manifest = cache_activations(TrainConfig(**{"batch_size": 1, **given}), layers, arguments.path, **options)
    size = sum((arguments.path / shard["file"]).stat().st_size for shard in manifest.shards)
    print(
        f"\n{arguments.path}: {manifest.tokens:,} tokens of layers {', '.join(map(str, manifest.layers))}, {size / 1e9:.2f} GB"
    )
    print(f"train on it: fastsae train --activations {shlex.quote(str(arguments.path))}")


def command_evaluate(arguments: argparse.Namespace) -> None:
    """`fastsae evaluate`."""
    from fastsae.data.hooks import place_of
    from fastsae.disk import write_json
    from fastsae.evaluate import write_report
    from fastsae.evaluate.gradient_sections import summary_lines
    from fastsae.peers import formats
    from fastsae.train.folder import CONFIG_FILE, check_writable, described, read_config
    from fastsae.train.run import evaluate_saved, load_sae

    given = _given(arguments)
    for option, file in (("--json", arguments.json), ("--report", arguments.report)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option}: expected the name of a file, got the folder {file}")
        if file is not None:
            check_writable(option, file.absolute().parent)
    folder = formats.find(arguments.path, formats.wanted_files())
    found = formats.recognise(folder)
    is_ours = found is None or found.name == "saelens"  # other libraries have a config.json, too
    if is_ours and (folder / CONFIG_FILE).is_file():
        config, sae = replace(read_config(folder), **given), load_sae(folder)
    else:
        missing = [f"--{name}" for name in ("model", "dataset") if name not in given]
        if missing:
            raise UsageError(f"{folder} has no {CONFIG_FILE} that names its data; give {', '.join(missing)}")
        sae = load_sae(folder)
        place = place_of(sae.metadata)
        if place is None and "layer" not in given:
            known = sae.metadata.get("hook_name") or "none"
            raise UsageError(
                f"{folder} names no layer that fastsae reads (its hook is {known}); give --layer, and --hook"
            )
        config = TrainConfig(**{**(place._asdict() if place else {}), **given})
    result = evaluate_saved(sae, config, arguments.measures or (), progress=not arguments.quiet)
    if arguments.json:
        write_json(arguments.json, result.metrics)
    if arguments.report:
        write_report(arguments.report, config=described(config), metrics=result.metrics, history=[], evaluation=result)
    print_summary(result.metrics)
    for figure, meaning in summary_lines(result.metrics):
        print(f"  {figure:>10}  {meaning}")


def command_convert(arguments: argparse.Namespace) -> None:
    """`fastsae convert`."""
    from fastsae.peers import formats

    source, target = formats.find(arguments.source, formats.wanted_files()), arguments.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"{target}: expected a new or an empty folder, got one that holds something; nothing was written"
        )
    try:
        converted = formats.read(source, arguments.source_format, k=arguments.k)
        changes = formats.write(converted, target, arguments.target_format).notes
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise FastsaeError(str(error)) from None
    kind = "transcoder" if converted.is_transcoder else "SAE"
    origin = f"read as {converted.history['format']}"
    print(f"{target}: a {converted.architecture} {kind}, d_in {converted.d_in:,}, d_sae {converted.d_sae:,}, {origin}")
    for change in changes:
        print(f"  {change}")
    if arguments.check:
        print_difference(formats.difference(converted, formats.read(target, arguments.target_format, k=arguments.k)))


COMMANDS = {
    "train": command_train,
    "compare": command_compare,
    "cache": command_cache,
    "evaluate": command_evaluate,
    "convert": command_convert,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for a failure, 2 for wrong usage, 130 or 143 when interrupted."""
    with tolerant_output():
        parser = build_parser()
        arguments = parser.parse_args(argv)
        check_values(parser, arguments)
        show_log()
        bound_product_caches()
        try:
            with signals_end_the_command():
                import_for_good(model=arguments.command != "convert")
                COMMANDS[arguments.command](arguments)
        except FastsaeError as error:
            return fail(as_flag(str(error)), 2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            return fail(describe_os_error(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return fail(OUT_OF_MEMORY)
        except KeyboardInterrupt as interruption:
            return fail(str(interruption) or "interrupted", exit_status(interruption))
    return 0


def fail(message: str, status: int = 1) -> int:
    """Prints why the program ends, and returns its exit status."""
    print(f"fastsae: {message}", file=sys.stderr)
    return status


def show_log() -> None:
    """This package's log lines on stderr; those of other libraries stay as they configure them, without their retries."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    for name in ("huggingface_hub", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def describe_os_error(error: OSError) -> str:
    """A full disk or a forbidden folder in words."""
    place = error.filename or "a file"
    if error.errno == errno.ENOSPC:
        return f"the disk is full, {place} could not be written; free some space, then run again, with --resume if training began"
    return f"{place}: {error.strerror or error}"


if __name__ == "__main__":
    sys.exit(main())
