"""`fastsae interpret`: what features mean, by a judge, with how much that is worth."""

from __future__ import annotations

import argparse
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastsae.commands.saved import DATA_OPTIONS, saved_sae
from fastsae.disk import local_path
from fastsae.errors import UsageError
from fastsae.flags import Commands, add_config_flags, given_options, path, place, whole_number

if TYPE_CHECKING:
    from fastsae.interpret.examine import Subject

SCORES = ("rubric", "detection", "intruder", "example_embedding")  # as fastsae.interpret.scores has them

_INTERPRET = """\
Collects examples of every feature in one pass over held-out dialogues, draws features at random, and lets a judge score them.

  fastsae interpret my-sae                                    offline: a judge of word embeddings that explains nothing
  fastsae interpret my-sae --judge hf:Qwen/Qwen2.5-1.5B-Instruct                a local language model, no generation but names
  fastsae interpret my-sae --judge openai:gpt-4o@https://api.openai.com/v1 --dry-run       what it would cost
  fastsae interpret runs/fast/fast-seed-0 runs/bt-f/bt-f-seed-0 --output both   two SAEs of a comparison, on the same dialogues

scores, each beside what chance gives:
  rubric             FAST's 1 to 5 of the five strongest contexts; the share of 4 and 5, with Wilson's interval
  detection          having seen some windows, in which others, of other dialogues, does the feature fire?
  intruder           which of five windows is the one in which it is silent?
  example_embedding  are its windows more alike each other than others? needs no judge
"""


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "interpret",
        help="score what features mean, and write pages of them",
        description=_INTERPRET,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_sae_arguments(
        parser, n_features="number of features that are scored, drawn at random of those with five contexts [128]"
    )
    parser.add_argument(
        "--judge", default="embedding", metavar="JUDGE", help="embedding, hf:MODEL or openai:MODEL@URL [embedding]"
    )
    parser.add_argument(
        "--scores",
        type=lambda text: text.split(","),
        default=SCORES,
        metavar="NAME,...",
        help=f"what is scored [{','.join(SCORES)}]",
    )
    parser.add_argument(
        "--judge-device",
        default="cpu",
        metavar="NAME",
        help="where the model of hf: computes: cpu, cuda or cuda:N [cpu]",
    )
    endpoint = parser.add_argument_group("judge behind an endpoint")
    endpoint.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the key, which is written nowhere [OPENAI_API_KEY]",
    )
    endpoint.add_argument(
        "--budget", type=whole_number, metavar="N", help="number of tokens after which the judge is asked no more"
    )
    endpoint.add_argument("--dry-run", action="store_true", help="count the judge's calls and tokens, and ask nothing")
    add_config_flags(parser, DATA_OPTIONS)


def add_sae_arguments(parser: argparse.ArgumentParser, n_features: str) -> None:
    """The SAEs, their features and where the results go."""
    parser.add_argument(
        "paths",
        type=place,
        nargs="+",
        metavar="SAE",
        help="folders of SAEs, of this or another library, or hub ids: owner/name/folder@revision",
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="FOLDER",
        help="folder for the results, in which several SAEs have folders of their own (default: that of the SAE)",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--features", type=whole_number, metavar="N", help=n_features)
    chosen.add_argument(
        "--feature", type=_whole_numbers, metavar="N,...", help="these features, in the place of such that are drawn"
    )
    parser.add_argument(
        "--neuronpedia",
        type=path,
        metavar="FOLDER",
        help="folder for the features of the page in SAEDashboard's format, too",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def _whole_numbers(text: str) -> list[int]:
    return [whole_number(part) for part in text.split(",")]


def output_of(arguments: Namespace) -> Path:
    """The folder of the results."""
    if arguments.features is not None and arguments.features < 1:
        raise UsageError(f"--features: expected at least 1, got {arguments.features}")
    if arguments.output is not None:
        return Path(arguments.output)
    if len(arguments.paths) > 1:
        raise UsageError("--output: expected a folder for the results of several SAEs, got none")
    folder = local_path(arguments.paths[0])
    if not folder.is_dir():
        raise UsageError(f"--output: expected a folder for the results, because {folder} is no folder of this machine")
    return folder


def subjects_of(arguments: Namespace, output: Path) -> list[Subject]:
    """The SAEs of the command line; several of them have folders of their own in `output`."""
    from fastsae.interpret.examine import Subject
    from fastsae.train.folder import check_writable
    from fastsae.train.pipeline import build_pipeline

    given, names = given_options(arguments), _names(arguments.paths)
    check_writable("--output", output.absolute())
    subjects = []
    for name, saved in zip(names, arguments.paths, strict=True):
        sae, config = saved_sae(saved, given)
        data = partial(build_pipeline, config, evaluated=sae, progress=not arguments.quiet)
        subjects.append(Subject(name, sae, data, output / name if len(names) > 1 else output, config.seed))
    return subjects


def _names(places: list[str]) -> list[str]:
    """A short name for each place: its last part, or as many of them as tell all apart."""
    paths = [local_path(place) for place in places]
    parts = [(path.resolve() if path.exists() else path).parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UsageError("SAE: expected different SAEs, got one of them twice")
    names = list[str]()
    for n in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-n:]).strip("/-") for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def run(arguments: Namespace) -> None:
    """Runs the command."""
    from fastsae.interpret.judges import EndpointOptions, judge_maker
    from fastsae.interpret.run import N_SCORED, PAGE_FILE, RESULT_FILE, interpret
    from fastsae.interpret.summary import print_calls, print_scores

    if arguments.dry_run and not arguments.judge.startswith("openai:"):
        raise UsageError(f"--dry-run: expected a judge behind an endpoint, which has a price, got {arguments.judge}")
    output, progress = output_of(arguments), not arguments.quiet
    endpoint = EndpointOptions(
        key_variable=arguments.key_variable,
        budget=arguments.budget,
        cache=output / "answers",
        dry_run=arguments.dry_run,
    )
    judge_of = judge_maker(arguments.judge, endpoint=endpoint, device=arguments.judge_device, progress=progress)
    features = arguments.feature or arguments.features or N_SCORED
    options = {"scores": arguments.scores, "features": features, "progress": progress}
    options |= {"writes": not arguments.dry_run, "neuronpedia": arguments.neuronpedia}
    subjects = subjects_of(arguments, output)
    result = interpret(subjects, output, judge_of, **options)
    if arguments.dry_run:
        print_calls(result)
        return
    print_scores(result)
    print(f"\nresult   {output / RESULT_FILE}")
    for subject in subjects:
        print(f"page     {subject.folder / PAGE_FILE}")
