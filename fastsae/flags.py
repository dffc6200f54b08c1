"""The flags of the command line: one for each option of a run, and paths; a wrong value is named with what was expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsae.comparison.arms import ARMS, DECIDED_BY_ARMS, DEFAULT_ARMS
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
}
METAVARS = {int: "N", float: "X", str: "NAME"}
OPTIONS = {f.name: f for f in fields(TrainConfig)}


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


FORMATS = (
    "saelens gemma-scope gemma-scope-2 sparsify dictionary-learning llama-scope llamascopium openai goodfire deepseek-r1 "
    "hook-z qwen-scope circuit-tracer"
).split()  # as the registry has them, whose import takes seconds
_CONVERT = """\
Turns an SAE of one library into files of another: the same function, or one error that says why the format cannot hold it.

  fastsae convert layer_20/width_16k/average_l0_71 my-sae                Gemma Scope to SAELens, the default
  fastsae convert my-sae for-sparsify --to sparsify --check              and compare both on random inputs
  fastsae convert google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 my-sae      from the hub
  fastsae convert SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer9.sae.pt my-sae --from qwen-scope

The source's format is recognised by its files. Whatever was transposed, folded or rescaled is listed, and written beside
the weights with the SHA-256 of the source's files. Nothing in a file is run: no pickle is read.
"""


def add_cache_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`fastsae cache`."""
    parser = commands.add_parser(
        "cache",
        help="write activations once, for any number of runs with --activations",
        description="Runs the model over the dialogues that `fastsae train` would read, and writes the activations of one or "
        "several layers. An interrupted one goes on with --resume, which with a higher --tokens adds to a complete one, too.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "path", type=path, metavar="FOLDER", help="new folder, of 2 or 4 bytes a token, dimension and layer"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted cache, or add tokens to one")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    names = (
        "model dataset split text layer hook model_dtype max_length max_dialogues dedup_words eval_dialogues sequencing "
        "block_length tokens forward_tokens device data_seed"
    )
    add_config_flags(parser, names.split(), several=("layer",))


_COMPARE = """\
Trains SAEs by FAST and by other ways on the same number of tokens, at the same sparsity, and measures all of them on the same
held-out dialogues: what differs, with an interval, and what does not.

  fastsae compare                                        the embedded model and dialogues, minutes on a CPU
  fastsae compare --model ./my-model --dataset chats.jsonl --text pile.jsonl --layer 12 --tokens 2e6
  fastsae compare ... --dry-run                          the arms with their tokens, time and memory, and nothing else
  fastsae compare --output comparison --resume           go on with an interrupted comparison

arms:
"""


def add_compare_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`fastsae compare`."""
    of_arms = "".join(f"  {name:16}{arm.meaning}\n" for name, arm in ARMS.items())
    parser = commands.add_parser(
        "compare",
        help="compare FAST with block training, at matched sparsity, with controls and intervals",
        description=_COMPARE + of_arms,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="new folder for the results (default: compare-MODEL)"
    )
    parser.add_argument(
        "--arms",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help=f"ways to train [{','.join(DEFAULT_ARMS)}]",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and end")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted comparison in --output")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    left_out = (*DECIDED_BY_ARMS, "activations", "log", "data_seed", "init_from")
    add_config_flags(parser, [name for name in OPTIONS if name not in left_out], several=("seed",))


_EVALUATE = """\
Measures reconstruction, sparsity and delta loss on held-out dialogues. A folder of `fastsae train` knows its model and data.

  fastsae evaluate my-sae --json metrics.json --report page.html
  fastsae evaluate my-sae --gsnr                               is a parameter's gradient signal or noise?
  fastsae evaluate my-sae --leakage --block-length 512         what would blocks of this length do to each token?
"""


def add_evaluate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`fastsae evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a saved SAE on held-out dialogues",
        description=_EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "path",
        type=place,
        metavar="SAE",
        help="folder with cfg.json and sae_weights.safetensors, another library's, or a hub id: owner/name/folder@revision",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="file to which the metrics are written as well")
    parser.add_argument("--report", type=path, metavar="FILE", help="file for a page (HTML) that shows them")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    gradients = parser.add_argument_group("gradients of the loss, measured on demand")
    options: dict[str, Any] = {"dest": "measures", "action": "append_const"}
    gradients.add_argument(
        "--gsnr",
        **options,
        const="gsnr",
        help="signal-to-noise ratios: the squared mean of each parameter's gradient over its variance, over tokens and over "
        "dialogues, free of the bias of few draws",
    )
    gradients.add_argument(
        "--leakage",
        **options,
        const="leakage",
        help="how far a token's activation and gradients move where it stands in a block of --block-length tokens, by its "
        "distance from the start of its dialogue; packed rows, where dialogues do not see each other, are the control",
    )
    of_data = "model dataset split layer hook model_dtype max_length max_dialogues dedup_words eval_dialogues max_norm_multiple"
    add_config_flags(parser, [*of_data.split(), "block_length", "forward_tokens", "device", "seed"])


def add_convert_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`fastsae convert`."""
    parser = commands.add_parser(
        "convert",
        help="turn an SAE of one library into files of another",
        description=_CONVERT,
        epilog=f"formats: {', '.join(FORMATS)}; --from also takes the names of SAELens' loaders, such as gemma_2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", type=place, metavar="SOURCE", help="folder, file of weights, or hub id: owner/name/folder@revision"
    )
    parser.add_argument("target", type=path, metavar="TARGET", help="new folder")
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="format of the source, not its files' own"
    )
    parser.add_argument(
        "--to", dest="target_format", default="saelens", metavar="FORMAT", help="format to write [saelens]"
    )
    parser.add_argument("--k", type=_whole_number, metavar="N", help="active features per token, where no file says it")
    parser.add_argument(
        "--check", action="store_true", help="compare source and target on random inputs, print how far apart"
    )


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
    readers: dict[type, Callable[[str], Any]] = {int: _whole_number, float: _number, str: str}
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


def parsed(name: str, text: str) -> Any:
    """The value of an option from its text, as the command line reads it.

    Raises:
        UsageError: It is none.
    """
    try:
        return _parser_of(option_kinds(TrainConfig)[name])(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name}: {error}") from None


def _whole_number(text: str) -> int:
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
