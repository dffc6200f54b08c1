"""The command line: `fastsae train`, `fastsae evaluate` and `fastsae convert`."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsae.disk import local_path
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory
from fastsae.flags import (
    OPTIONS,
    add_config_flags,
    add_convert_command,
    as_flag,
    check_values,
    flag,
    path,
    without_effect,
)
from fastsae.interrupt import exit_status, signals_end_the_command
from fastsae.terminal import tolerant_output
from fastsae.train.config import PRESETS, TrainConfig
from fastsae.version import __version__

DESCRIPTION = """\
Sparse autoencoders (SAEs) for language models.

  fastsae train                       train on the embedded chat model and dialogues: no network, no GPU
  fastsae train --model Qwen/Qwen2.5-0.5B-Instruct --dataset HuggingFaceH4/ultrachat_200k --split train_sft \\
                --layer 12 --tokens 40000000
  fastsae train --architecture topk --k 32
  fastsae train --output my-sae --resume     go on with an interrupted run
  fastsae train --model ./my-model --dataset chats.jsonl     rows like {"messages": [{"role": ..., "content": ...}]}
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
    train.add_argument("--quiet", action="store_true", help="show no progress bars")
    add_config_flags(train)

    measure = commands.add_parser(
        "evaluate",
        help="measure a saved SAE on held-out dialogues",
        description="Measures reconstruction, sparsity and delta loss. A folder of `fastsae train` knows its model and data.",
        allow_abbrev=False,
    )
    measure.add_argument(
        "path",
        type=path,
        metavar="FOLDER",
        help="folder with cfg.json and sae_weights.safetensors, or another library's (see fastsae convert --help)",
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
    from fastsae.train.folder import CONFIG_FILE, REPORT_FILE, is_new, read_config
    from fastsae.train.run import train
    from fastsae.train.trainer import SAE_CLASSES

    given = _given(arguments)
    if arguments.resume and arguments.output is None:
        raise UsageError("--resume: expected --output with the folder of the interrupted run")
    if arguments.resume and not (arguments.output.is_dir() and is_new(arguments.output)):
        if arguments.preset is not None:
            raise UsageError("--preset: a resumed run keeps the options it was started with; drop the flag")
        output = arguments.output
        config = replace(read_config(output), **given)
    else:
        if arguments.resume and not (given or arguments.preset):
            raise UsageError(
                f"--resume: the run in {arguments.output} ended before it wrote {CONFIG_FILE}; start it again with its options"
            )
        if given.get("text") is not None and "dataset" not in given:
            raise UsageError(
                "--text: expected --dataset with dialogues for the evaluation, which reads whole dialogues, got none"
            )
        config = TrainConfig(**{**PRESETS[arguments.preset or "recommended"], **given})
        layer = "" if config.layer is None else f"-layer{config.layer}"
        name = local_path(config.model).resolve().name  # resolved, because `.` has no name
        output = arguments.output or Path(f"sae-{name}{layer}")
    if unused := without_effect(config, given):
        log.warning("without effect on a %s run: %s", config.architecture, ", ".join(map(flag, unused)))
    metrics = train(config, output, resume=arguments.resume, progress=not arguments.quiet)
    cost = f"{metrics['seconds']:.0f} s, of which the evaluation took {metrics['seconds_of_evaluation']:.0f} s"
    print(f"\n{output}: {metrics['tokens']:,} tokens in {cost}")
    print_summary(metrics)
    name = SAE_CLASSES[config.architecture].__name__
    print(f"\nreport   {output / REPORT_FILE}\nload it  fastsae.{name}.load({str(output)!r})")


def command_evaluate(arguments: argparse.Namespace) -> None:
    """`fastsae evaluate`."""
    from fastsae.disk import write_json
    from fastsae.train.folder import CONFIG_FILE, check_writable, read_config
    from fastsae.train.run import evaluate_folder

    given = _given(arguments)
    if not arguments.path.exists():
        raise UsageError(f"{arguments.path}: expected the folder of a saved SAE, there is no such folder")
    if arguments.json:
        if arguments.json.is_dir():
            raise UsageError(f"--json: expected the name of a file, got the folder {arguments.json}")
        check_writable("--json", arguments.json.absolute().parent)
    if (arguments.path / CONFIG_FILE).is_file():
        config = replace(read_config(arguments.path), **given)
    else:
        missing = [f"--{name}" for name in ("model", "dataset", "layer") if name not in given]
        if missing:
            raise UsageError(f"{arguments.path} has no {CONFIG_FILE} that names its data; give {', '.join(missing)}")
        config = TrainConfig(**given)
    result = evaluate_folder(arguments.path, config, progress=not arguments.quiet)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for a failure, 2 for wrong usage, 130 or 143 when interrupted."""
    with tolerant_output():
        parser = build_parser()
        arguments = parser.parse_args(argv)
        check_values(parser, arguments)
        show_log()
        try:
            with signals_end_the_command():
                commands = {"train": command_train, "evaluate": command_evaluate, "convert": command_convert}
                commands[arguments.command](arguments)
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
