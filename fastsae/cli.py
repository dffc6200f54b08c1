"""The command line: `fastsae train`, `cache`, `evaluate` and `convert`."""

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
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory
from fastsae.flags import (
    OPTIONS,
    Several,
    add_cache_command,
    add_config_flags,
    add_convert_command,
    as_flag,
    check_values,
    flag,
    parsed,
    path,
    place,
    without_effect,
)
from fastsae.imports import import_for_good
from fastsae.interrupt import exit_status, signals_end_the_command
from fastsae.terminal import tolerant_output
from fastsae.train.config import PRESETS, TrainConfig
from fastsae.train.grid import OF_ONE_SAE
from fastsae.version import __version__

DESCRIPTION = """\
Sparse autoencoders (SAEs) for language models.

  fastsae train                       train on the embedded chat model and dialogues: no network, no GPU
  fastsae train --model Qwen/Qwen2.5-0.5B-Instruct --dataset HuggingFaceH4/ultrachat_200k --split train_sft \\
                --layer 12 --tokens 40000000
  fastsae train --architecture topk --k 32
  fastsae train --layers 2,3 --target-l0 16,32 --output grid     four SAEs for one pass of the model, each in its folder
  fastsae train --output my-sae --resume     go on with an interrupted run
  fastsae train --model ./my-model --dataset chats.jsonl     rows like {"messages": [{"role": ..., "content": ...}]}
  fastsae cache acts --layers 2,3     write activations once, for fastsae train --activations acts
  fastsae train --model ./my-model --dataset chats.jsonl --text pile.jsonl --sequencing block     plain text, in blocks
  fastsae evaluate my-sae             measure a saved SAE on held-out dialogues, of this or another library
  fastsae convert params.npz my-sae   turn another library's SAE into this one's files, or back with --to

Activation units: while training, activations are scaled to a mean norm of sqrt(d_in); options "in activation units" mean
that scale. Exit status: 0 done, 1 the run failed, 2 an argument is wrong, 130 interrupted (Ctrl-C), 143 ended by
SIGTERM; both write a checkpoint first, a second one ends at once.
"""
SUMMARY = (
    ("fvu", "of the variance is left unexplained (FVU), attention sinks left out", "{:.4f}"),
    ("special_fvu", "the same on special tokens", "{:.4f}"),
    ("l0", "features fire on a token (L0)", "{:.1f}"),
    ("dead_share", "of the features never fire", "{:.1%}"),
    ("mse", "squared error per element, averaged per dialogue (MSE)", "{:.4g}"),
    ("mse_with_sinks", "the same with attention sinks", "{:.4g}"),
    ("special_mse", "squared error per element on special tokens", "{:.4g}"),
    ("special_mse_with_sinks", "the same with attention sinks", "{:.4g}"),
    ("ce", "nats per token: the model's own cross-entropy", "{:.4f}"),
    ("ce_spliced", "with the reconstruction in place of the activations", "{:.4f}"),
    ("delta_loss_percent", "% change of the cross-entropy (delta loss)", "{:+.2f}"),
    ("recovered", "of the loss between zeros and the model is recovered", "{:.1%}"),
)
SUMMARY_OF_TRAINING = (
    ("padding_share", "of the tokens that the language model computed for training were padding", "{:.1%}"),
    ("sinks_left_out", "tokens were left out of training as attention sinks, beside the first of each context", "{:,}"),
)

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
    add_config_flags(train, several=OF_ONE_SAE)

    add_cache_command(commands)
    measure = commands.add_parser(
        "evaluate",
        help="measure a saved SAE on held-out dialogues",
        description="Measures reconstruction, sparsity and delta loss. A folder of `fastsae train` knows its model and data.",
        allow_abbrev=False,
    )
    measure.add_argument(
        "path",
        type=place,
        metavar="SAE",
        help="folder with cfg.json and sae_weights.safetensors, another library's, or a hub id: owner/name/folder@revision",
    )
    measure.add_argument("--json", type=path, metavar="FILE", help="file to which the metrics are written as well")
    measure.add_argument("--quiet", action="store_true", help="show no progress bars")
    of_data = (
        "model dataset split layer model_dtype max_length max_dialogues dedup_words eval_dialogues max_norm_multiple"
    )
    add_config_flags(measure, [*of_data.split(), "forward_tokens", "device", "seed"])
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
    cost = f"{metrics['seconds']:.0f} s, of which the evaluation took {metrics['seconds_of_evaluation']:.0f} s"
    print(f"\n{output}: {metrics['tokens']:,} tokens in {cost}")
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
        raise UsageError(
            "--text: expected --dataset with dialogues for the evaluation, which reads whole dialogues, got none"
        )
    layer = "" if first.layer is None or "layer" in varied or arguments.spec else f"-layer{first.layer}"
    name = local_path(first.model).resolve().name  # resolved, because `.` has no name
    return configs, arguments.output or Path(f"sae{'' if '' in configs else 's'}-{name}{layer}")


def command_cache(arguments: argparse.Namespace) -> None:
    """`fastsae cache`."""
    from fastsae.train.caching import cache_activations, options_of

    given = _given(arguments)
    layers = given.pop("layer", ())
    if arguments.resume:
        earlier = options_of(arguments.path)
        layers = layers or earlier.pop("layer", ())
        given = {**earlier, **given}
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
    from fastsae.disk import write_json
    from fastsae.peers import formats
    from fastsae.train.folder import CONFIG_FILE, check_writable, read_config
    from fastsae.train.run import evaluate_folder

    given = _given(arguments)
    if arguments.json:
        if arguments.json.is_dir():
            raise UsageError(f"--json: expected the name of a file, got the folder {arguments.json}")
        check_writable("--json", arguments.json.absolute().parent)
    folder = formats.find(arguments.path, formats.wanted_files())
    found = formats.recognise(folder)
    is_ours = found is None or found.name == "saelens"  # other libraries have a config.json, too
    if is_ours and (folder / CONFIG_FILE).is_file():
        config = replace(read_config(folder), **given)
    else:
        missing = [f"--{name}" for name in ("model", "dataset", "layer") if name not in given]
        if missing:
            raise UsageError(f"{folder} has no {CONFIG_FILE} that names its data; give {', '.join(missing)}")
        config = TrainConfig(**given)
    result = evaluate_folder(folder, config, progress=not arguments.quiet)
    if arguments.json:
        write_json(arguments.json, result.metrics)
    print_summary(result.metrics)


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


def print_difference(found: dict[str, float]) -> None:
    """What `--check` has found.

    Raises:
        FastsaeError: The two SAEs are not the same function.
    """
    print(
        f"  {found['sae_out']:.3g}  largest difference of a reconstruction, whose largest number is {found['size']:.3g}"
    )
    print(
        f"  {found['other_features']:.0f}  of {found['tokens']:.0f} tokens have other features, where rounding decides"
    )
    if not (found["sae_out"] <= 1e-3 * found["size"] and 2 * found["other_features"] <= found["tokens"]):
        raise FastsaeError("--check: the written SAE is not the one that was read; please report it with both files")


def print_summary(metrics: dict[str, Any]) -> None:
    """The headline numbers, one a line, with what they mean."""
    of_training = [line for line in SUMMARY_OF_TRAINING if line[0] in metrics]
    for name, meaning, form in (*SUMMARY, *of_training):
        value = metrics.get(name)
        print(f"  {'undefined' if value is None else form.format(value):>10}  {meaning}")
    if metrics.get("dialogues_dropped"):
        reasons = ", ".join(f"{n:,} because {reason}" for reason, n in metrics["dropped_by_reason"].items())
        print(f"  {metrics['dialogues_dropped']:>10,}  dialogues could not be used: {reasons}")
    if metrics.get("unknown_roles"):
        words = ", ".join(f"{word!r} ({n:,})" for word, n in metrics["unknown_roles"].items())
        print(f"  {'unknown':>10}  roles, and the dialogues that have them: {words}")
    for warning in metrics.get("warnings") or ():
        print(f"  warning: {warning}")


def print_table(metrics: dict[str, dict[str, Any]], output: Path) -> None:
    """The headline numbers of several SAEs, a line each."""
    columns = (("fvu", "FVU", ".4f"), ("special_fvu", "special", ".4f"), ("l0", "L0", ".1f"), ("dead_share", "dead", ".1%"),
               ("delta_loss_percent", "delta loss", "+.1f"))  # fmt: skip
    width = max(map(len, metrics))
    print(f"\n{output}: {len(metrics)} SAEs\n{'':{width}}" + "".join(f"{title:>12}" for _, title, _ in columns))
    for name, found in metrics.items():
        cells = ["undefined" if found[key] is None else format(found[key], form) for key, _, form in columns]
        print(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
        for warning in found.get("warnings") or ():
            print(f"{'':{width}}  warning: {warning}")


COMMANDS = {
    "train": command_train,
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
