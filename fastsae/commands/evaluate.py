"""`fastsae evaluate`: a saved SAE on held-out dialogues."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import Any

from fastsae.commands.saved import DATA_OPTIONS, saved_sae
from fastsae.errors import UsageError
from fastsae.flags import Commands, add_config_flags, given_options, path, place
from fastsae.summary import print_summary

_EVALUATE = """\
Measures reconstruction, sparsity and delta loss on held-out dialogues. A folder of `fastsae train` knows its model and data.

  fastsae evaluate my-sae --json metrics.json --report page.html
  fastsae evaluate my-sae --gsnr                               is a parameter's gradient signal or noise?
  fastsae evaluate my-sae --leakage --block-length 512         what would blocks of this length do to each token?
"""


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
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
    add_config_flags(parser, [*DATA_OPTIONS, "block_length"])


def run(arguments: Namespace) -> None:
    """Runs the command."""
    from fastsae.disk import write_json
    from fastsae.evaluate import write_report
    from fastsae.evaluate.gradient_sections import summary_lines
    from fastsae.train.evaluation import evaluate_saved
    from fastsae.train.folder import check_writable, described

    given = given_options(arguments)
    for option, file in (("--json", arguments.json), ("--report", arguments.report)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option}: expected the name of a file, got the folder {file}")
        if file is not None:
            check_writable(option, file.absolute().parent)
    sae, config = saved_sae(arguments.path, given)
    result = evaluate_saved(sae, config, arguments.measures or (), progress=not arguments.quiet)
    if arguments.json:
        write_json(arguments.json, result.metrics)
    if arguments.report:
        write_report(arguments.report, config=described(config), metrics=result.metrics, history=[], evaluation=result)
    print_summary(result.metrics)
    for figure, meaning in summary_lines(result.metrics):
        print(f"  {figure:>10}  {meaning}")
