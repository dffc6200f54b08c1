"""The command line: `fastsae train` and `fastsae evaluate`."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastsae.disk import local_path
from fastsae.errors import FastsaeError, UsageError
from fastsae.interrupt import exit_status, signals_end_the_command
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
  fastsae evaluate my-sae             measure a saved SAE on held-out dialogues

Activation units: while training, activations are scaled to a mean norm of sqrt(d_in); options "in activation units" mean
that scale. Exit status: 0 done, 1 the run failed, 2 an argument is wrong, 130 interrupted (Ctrl-C), 143 ended by
SIGTERM; both write a checkpoint first, a second one ends at once.
"""
GROUPS = {
    "data": "data and language model",
    "sae": "sparse autoencoder",
    "training": "training",
    "running": "running",
}
METAVARS = {int: "N", float: "X", str: "NAME"}
SUMMARY = (
    ("fvu", "of the variance is left unexplained (FVU), position 0 excluded", "{:.4f}"),
    ("l0", "features fire on a token (L0)", "{:.1f}"),
    ("dead_share", "of the features never fire", "{:.1%}"),
    ("mse", "squared error per element, averaged per dialogue (MSE)", "{:.4g}"),
    ("special_mse", "the same on special tokens", "{:.4g}"),
    ("ce", "nats per token: the model's own cross-entropy", "{:.4f}"),
    ("ce_spliced", "with the reconstruction in place of the activations", "{:.4f}"),
    ("delta_loss_percent", "% change of the cross-entropy (delta loss)", "{:+.2f}"),
    ("recovered", "of the loss between zeros and the model is recovered", "{:.1%}"),
)


def _parse_optional(kind: Any) -> tuple[Any, bool]:
    """The type inside `X | None`, and whether None is allowed."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        return inner[0], True
    return kind, False


def _whole_number(text: str) -> int:
    """`1500000`, `1_500_000` or `1.5e6`."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def _optional(kind: Any) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__.strip("_")  # argparse names it in its message
    return parse


def add_config_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """One flag per field of TrainConfig; absent flags stay absent, so that presets and saved configs show through."""
    kinds = typing.get_type_hints(TrainConfig)
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for f in fields(TrainConfig):
        if names is not None and f.name not in names:
            continue
        kind, is_optional = _parse_optional(kinds[f.name])
        text = f.metadata["help"].replace("%", "%%")
        if f.default is not None:
            text += f" [{f.default}]"
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            settings["choices"] = typing.get_args(kind)
        else:
            parse = _whole_number if kind is int else kind
            settings |= {"type": _optional(parse) if is_optional else parse, "metavar": METAVARS[kind]}
        groups[f.metadata["group"]].add_argument("--" + f.name.replace("_", "-"), dest=f.name, **settings)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fastsae", description=DESCRIPTION, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"fastsae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train an SAE on a chat model, each dialogue whole (the FAST method)",
        description="Trains, evaluates and saves an SAE. Without arguments: the embedded demo, a few minutes on a CPU.",
    )
    train.add_argument("--output", type=local_path, help="new folder for the results [sae-MODEL]")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    train.add_argument("--preset", choices=PRESETS, help="recommended, or fast-paper: the options of arXiv:2506.07691")
    train.add_argument("--quiet", action="store_true", help="no progress bars")
    add_config_flags(train)

    measure = commands.add_parser(
        "evaluate",
        help="measure a saved SAE on held-out dialogues",
        description="Measures reconstruction, sparsity and delta loss. A folder of `fastsae train` knows its model and data.",
    )
    measure.add_argument("path", type=local_path, help="folder with cfg.json and sae_weights.safetensors")
    measure.add_argument("--json", type=local_path, help="also write the metrics to this file")
    measure.add_argument("--quiet", action="store_true", help="no progress bars")
    names = "model dataset split layer model_dtype max_length max_dialogues dedup_words eval_dialogues forward_tokens device seed"
    add_config_flags(measure, names.split())
    return parser


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {f.name for f in fields(TrainConfig)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def resumed_config(output: Path, given: dict[str, Any]) -> TrainConfig:
    """The config of the run in `output`; flags given beside --resume must agree with it."""
    from fastsae.train.folder import located, read_config

    config = read_config(output)
    for name, value in given.items():
        if name in ("model", "dataset"):
            value = located(value)
        if name != "device" and getattr(config, name) != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag}: the run in {output} was started with {getattr(config, name)}, got {value}; "
                "drop the flag to resume, or start a new run without --resume"
            )
    return replace(config, **{name: value for name, value in given.items() if name == "device"})


def command_train(arguments: argparse.Namespace) -> None:
    """`fastsae train`."""
    from fastsae.train.folder import CONFIG_FILE, REPORT_FILE, is_new
    from fastsae.train.run import train
    from fastsae.train.trainer import SAE_CLASSES

    given = _given(arguments)
    if arguments.resume and arguments.output is None:
        raise UsageError("--resume: expected --output with the folder of the interrupted run")
    if arguments.resume and not (arguments.output.is_dir() and is_new(arguments.output)):
        if arguments.preset is not None:
            raise UsageError("--preset: a resumed run keeps the options it was started with; drop the flag")
        config, output = resumed_config(arguments.output, given), arguments.output
    else:
        if arguments.resume and not (given or arguments.preset):
            raise UsageError(
                f"--resume: the run in {arguments.output} ended before it wrote {CONFIG_FILE}; start it again with its options"
            )
        config = TrainConfig(**{**PRESETS[arguments.preset or "recommended"], **given})
        layer = "" if config.layer is None else f"-layer{config.layer}"
        output = arguments.output or Path(f"sae-{Path(config.model).name}{layer}")
    metrics = train(config, output, resume=arguments.resume, progress=not arguments.quiet)
    print(f"\n{output}: {metrics['tokens']:,} tokens in {metrics['seconds']:.0f} s")
    print_summary(metrics)
    name = SAE_CLASSES[config.architecture].__name__
    print(f"\nreport   {output / REPORT_FILE}\nload it  fastsae.{name}.load({str(output)!r})")


def command_evaluate(arguments: argparse.Namespace) -> None:
    """`fastsae evaluate`."""
    from fastsae.disk import write_json
    from fastsae.train.folder import CONFIG_FILE, check_writable, read_config
    from fastsae.train.run import evaluate_folder

    given = _given(arguments)
    if (arguments.path / CONFIG_FILE).is_file():
        config = replace(read_config(arguments.path), **given)
    else:
        missing = [f"--{name}" for name in ("model", "dataset", "layer") if name not in given]
        if missing:
            raise UsageError(f"{arguments.path} has no {CONFIG_FILE} that names its data; give {', '.join(missing)}")
        config = TrainConfig(**given)
    if arguments.json:
        check_writable("--json", arguments.json.parent)
        if arguments.json.is_dir():
            raise UsageError(f"--json: expected a file, but {arguments.json} is a folder")
    result = evaluate_folder(arguments.path, config, progress=not arguments.quiet)
    print_summary(result.metrics)
    if arguments.json:
        write_json(arguments.json, result.metrics)


def print_summary(metrics: dict[str, Any]) -> None:
    """The headline numbers, one a line, with what they mean."""
    for name, meaning, form in SUMMARY:
        value = metrics.get(name)
        print(f"  {'undefined' if value is None else form.format(value):>10}  {meaning}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for a failure, 2 for wrong usage, 130 or 143 when interrupted."""
    arguments = build_parser().parse_args(argv)
    show_log()
    try:
        with signals_end_the_command():
            {"train": command_train, "evaluate": command_evaluate}[arguments.command](arguments)
    except FastsaeError as error:
        print(f"fastsae: {as_flag(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(f"fastsae: {describe_os_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        gc.freeze()  # or the interpreter looks through all objects of PyTorch and others before it ends, for seconds
        print(f"\nfastsae: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return exit_status(interruption)
    return 0


def show_log() -> None:
    """This package's log lines on stderr; those of other libraries stay as they configure them, without their retries."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("fastsae")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    for name in ("huggingface_hub", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def as_flag(message: str) -> str:
    """A message that begins with an option's name, with the flag in its place."""
    name, colon, rest = message.partition(":")
    known = {f.name for f in fields(TrainConfig)}
    return f"--{name.replace('_', '-')}:{rest}" if colon and name in known else message


def describe_os_error(error: OSError) -> str:
    """A full disk or a forbidden folder in words."""
    import errno

    place = error.filename or "a file"
    if error.errno == errno.ENOSPC:
        return f"the disk is full, {place} could not be written; free some space, then run again, with --resume if training began"
    return f"{place}: {error.strerror or error}"


if __name__ == "__main__":
    sys.exit(main())
