"""The command line: the parser of all commands, and how an error ends the program."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from fastsae.commands import cache, compare, convert, evaluate, interpret, pages, steer, train
from fastsae.environment import bound_product_caches, is_first, n_processes, rank
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory
from fastsae.flags import as_flag, check_values
from fastsae.imports import import_for_good
from fastsae.interrupt import exit_status, signals_end_the_command
from fastsae.terminal import tolerant_output
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
  torchrun --standalone --nproc-per-node 2 -m fastsae train --shard-features 2     on two processes that share the features
  fastsae train --dry-run --processes 8 --hardware h100     what a run will take of each of eight GPUs
  fastsae train --output my-sae --resume     go on with an interrupted run
  fastsae train --model ./my-model --dataset chats.jsonl     rows like {"messages": [{"role": ..., "content": ...}]}
  fastsae cache acts --layers 2,3     write activations once, for fastsae train --activations acts
  fastsae train --model ./my-model --dataset chats.jsonl --text pile.jsonl --sequencing block     plain text, in blocks
  fastsae compare                     FAST against block training at matched sparsity, with controls and intervals
  fastsae evaluate my-sae             measure a saved SAE on held-out dialogues, of this or another library
  fastsae interpret my-sae            what features mean, by a judge, beside what chance gives
  fastsae pages my-sae                where features fire, on a page
  fastsae steer my-sae                what the model writes when a feature is pushed, and how far one can push
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
_PAUSE = 1.0  # seconds within which torchrun ends the other processes once the first has

COMMANDS = {
    "train": train,
    "compare": compare,
    "cache": cache,
    "evaluate": evaluate,
    "interpret": interpret,
    "pages": pages,
    "steer": steer,
    "convert": convert,
}

log = logging.getLogger("fastsae")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are printed by one of several processes that `torchrun` has started with the same arguments."""

    def error(self, message: str) -> NoReturn:
        wait_for_the_first()
        super().error(message)


def build_parser() -> Parser:
    """The whole command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("fastsae", description=DESCRIPTION, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastsae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser


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
                if n_processes() > 1 and arguments.command != "train":
                    raise UsageError(
                        f"torchrun: expected fastsae train, which several processes can share, got {arguments.command}; start "
                        "it without torchrun"
                    )
                import_for_good(model=arguments.command != "convert")
                COMMANDS[arguments.command].run(arguments)
        except FastsaeError as error:
            return fail(error, as_flag(str(error)), 2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            return fail(error, describe_os_error(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return fail(error, OUT_OF_MEMORY)
        except KeyboardInterrupt as interruption:
            return fail(interruption, str(interruption) or "interrupted", exit_status(interruption))
    return 0


def fail(error: BaseException, message: str, status: int = 1) -> int:
    """Prints why the program ends, and returns its exit status; of several processes that end together, one prints it."""
    reported_by = getattr(error, "reported_by", 0 if isinstance(error, KeyboardInterrupt) else None)
    if reported_by is None:
        wait_for_the_first()
    elif reported_by != rank():
        message = f"ended, for the reason that process {reported_by} gives"
    who = "" if n_processes() == 1 else f" process {rank()}:"
    sys.stderr.write(f"fastsae:{who} {message}\n")  # at once: print writes the end of the line for itself
    return status


def wait_for_the_first() -> None:
    """Before processes know of each other they often fail alike: `torchrun` ends the others as soon as the first has ended."""
    if not is_first():
        time.sleep(_PAUSE)


def show_log() -> None:
    """This package's log lines on stderr, of the first of several processes; those of other libraries without their retries."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO if is_first() else logging.ERROR)
    for name in ("huggingface_hub", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def describe_os_error(error: OSError) -> str:
    """A full disk or a forbidden folder in words."""
    place = error.filename or "a file"
    if error.errno == errno.ENOSPC:
        return f"the disk is full, {place} could not be written; free some space, then run again, with --resume if training began"
    return f"{place}: {error.strerror or error}"
