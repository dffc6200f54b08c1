"""`fastsae pages`: where features fire and what they write, on pages that people look at; no judge is asked."""

from __future__ import annotations

import argparse
from argparse import Namespace

from fastsae.commands.interpret import add_sae_arguments, output_of, subjects_of
from fastsae.commands.saved import DATA_OPTIONS
from fastsae.flags import Commands, add_config_flags

_PAGES = """\
Writes features.html for an SAE: for each feature the windows in which it fires most and others at all activations, the
words that it raises and lowers, and its neighbours; with names and scores where `fastsae interpret` left some in the folder.
The page needs no network. Examples are collected in one pass over held-out dialogues, unless they lie in the folder already.

  fastsae pages my-sae                       200 features: by special tokens, and at random
  fastsae pages my-sae --feature 13,794      these
  fastsae pages my-sae --features 1000 --neuronpedia for-neuronpedia       in SAEDashboard's format as well
"""


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "pages",
        help="write a page of an SAE's features",
        description=_PAGES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_sae_arguments(parser, n_features="number of features on a page [200]")
    add_config_flags(parser, DATA_OPTIONS)


def run(arguments: Namespace) -> None:
    """Runs the command."""
    from fastsae.interpret.run import N_SHOWN, write_pages

    output = output_of(arguments)
    features = arguments.feature or arguments.features or N_SHOWN
    options = {"features": features, "neuronpedia": arguments.neuronpedia, "progress": not arguments.quiet}
    for page in write_pages(subjects_of(arguments, output), output, **options):
        print(f"page     {page}")
