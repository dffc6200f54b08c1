"""`fastsae compare`: FAST against other ways to train, on the same tokens and at the same sparsity."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

from fastsae.comparison.arms import ARMS, DECIDED_BY_ARMS, DEFAULT_ARMS
from fastsae.disk import local_path
from fastsae.errors import UsageError
from fastsae.flags import OPTIONS, Commands, Several, add_config_flags, given_options, path

_COMPARE = """\
Trains SAEs by FAST and by other ways on the same number of tokens, at the same sparsity, and measures all of them on the same
held-out dialogues: what differs, with an interval, and what does not.

  fastsae compare                                        the embedded model and dialogues, minutes on a CPU
  fastsae compare --model ./my-model --dataset chats.jsonl --text pile.jsonl --layer 12 --tokens 2e6
  fastsae compare ... --dry-run                          the arms with their tokens, time and memory, and nothing else
  fastsae compare --output comparison --resume           go on with an interrupted comparison

arms:
"""


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
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


def run(arguments: Namespace) -> None:
    """Runs the command."""
    from fastsae.comparison.costs import estimate
    from fastsae.comparison.run import PAGE_FILE, carry_out, new_plan, saved_plan
    from fastsae.comparison.summary import print_plan, print_result

    given = given_options(arguments)
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
