"""`fastsae cache`: activations, written once for any number of runs."""

from __future__ import annotations

import shlex
from argparse import Namespace

from fastsae.flags import Commands, add_config_flags, check_dataset, given_options, path
from fastsae.train.config import TrainConfig


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
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


def run(arguments: Namespace) -> None:
    """Runs the command."""
    from fastsae.train.caching import cache_activations, options_of

    given = given_options(arguments)
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
