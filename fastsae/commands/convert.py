"""`fastsae convert`: an SAE of one library as files of another."""

from __future__ import annotations

import argparse
from argparse import Namespace

from fastsae.errors import FastsaeError, UsageError
from fastsae.flags import Commands, path, place, whole_number
from fastsae.summary import print_difference

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


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
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
    parser.add_argument("--k", type=whole_number, metavar="N", help="active features per token, where no file says it")
    parser.add_argument(
        "--check", action="store_true", help="compare source and target on random inputs, print how far apart"
    )


def run(arguments: Namespace) -> None:
    """Runs the command."""
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
