"""`fastsae steer`: what a model writes when a feature is pushed, how far one can push, and what it costs."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.commands.saved import DATA_OPTIONS, saved_sae
from fastsae.disk import local_path
from fastsae.errors import UsageError
from fastsae.flags import Commands, add_config_flags, given_options, path, place, whole_number

if TYPE_CHECKING:
    from fastsae.steering.options import Plan, Subject
    from fastsae.train.pipeline import Pipeline

MODES = ("add", "clamp", "min_clamp", "scale", "ablate", "orthogonal")  # as fastsae.steering.edits has them
UNITS = ("absolute", "max", "norm")
POSITIONS = ("all", "prompt", "generated", "special", "assistant")
DYNAMIC = ("decay", "kl_cap", "set_point")
PAPER_ALPHAS = (0.0, 15.0, 25.0, 50.0, 100.0, 150.0, 200.0)
N_PROMPTS = 3
_LONGEST_PROMPT = 400  # characters of a dialogue's first turn that serves as a prompt
_N_WORDS, _N_RAISED = 5, 60
_WORD_BEGINS = ("Ġ", "▁")  # the signs of both kinds of tokenizers for a space before a token

_STEER = """\
Adds a feature's direction to the residual stream while the model answers, dose by dose, beside the model as it is, a random
direction of the same length and a model that is asked in words. Writes steer.json and steer.html.

  fastsae steer my-sae                                         the strongest feature of the special tokens, as in the FAST paper
  fastsae steer my-sae --alpha paper                           the paper's doses: 0, 15, 25, 50, 100, 150, 200
  fastsae steer my-sae --feature 794 --alpha 0,2,4 --unit max  in units of the feature's largest activation
  fastsae steer my-sae --select "lists" --prompt "How do I sort?" --stream     a feature that fires on a text, as it is written
  fastsae steer my-sae --feature 794 --mode clamp --alpha 0,8 --positions generated

alpha auto, which is the default, looks for the strength at which the 95th percentile of the tokens' KL from the unsteered
model is 1 nat, and tries multiples of it. Dynamic doses are brought to the same mean KL as a fixed one.
"""


def add_parser(commands: Commands) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "steer",
        help="push a feature while the model writes, and measure what that does",
        description=_STEER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "path",
        type=place,
        metavar="SAE",
        help="folder of an SAE, of this or another library, or a hub id: owner/name/folder@revision",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--feature", type=_whole_numbers, metavar="N,...", help="these features, pushed together")
    chosen.add_argument(
        "--select",
        default="special",
        metavar="HOW",
        help="special: the strongest at the chat template's special tokens; output-score: what changes the next word most in its "
        "own direction; or a text: features of this explanation, or that fire on it [special]",
    )
    parser.add_argument(
        "--top", type=whole_number, default=1, metavar="N", help="how many of the selected, pushed together [1]"
    )
    parser.add_argument("--alpha", type=_alphas, default="auto", metavar="X,...", help="doses, paper, or auto [auto]")
    parser.add_argument("--mode", choices=MODES, default="add", help="what is done to the feature [add]")
    parser.add_argument("--unit", choices=UNITS, default="absolute", help="what alpha is a multiple of [absolute]")
    parser.add_argument("--positions", choices=POSITIONS, default="all", help="which tokens are edited [all]")
    parser.add_argument(
        "--dynamic",
        type=_names,
        metavar="NAME,...",
        help=f"doses that change while the text is written, or none [{','.join(DYNAMIC)} for the mode add]",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"what the user says; may be given several times [the first turns of {N_PROMPTS} held-out dialogues]",
    )
    parser.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what the user adds for the prompted texts, or none [to use words that the feature raises]",
    )
    parser.add_argument("--max-new-tokens", type=whole_number, default=64, metavar="N", help="of each text [64]")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token, others draw [0]"
    )
    parser.add_argument("--stream", action="store_true", help="show texts while they are written")
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="folder for the results (default: that of the SAE)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    add_config_flags(parser, DATA_OPTIONS)


def run(arguments: Namespace) -> None:
    """Runs the command."""
    from fastsae.steering.run import PAGE_FILE, RESULT_FILE, steer_texts
    from fastsae.steering.summary import print_result, print_texts, streamed
    from fastsae.train.folder import check_writable
    from fastsae.train.pipeline import build_pipeline

    output = _output_of(arguments)
    check_writable("--output", output.absolute())
    progress = not arguments.quiet
    given = given_options(arguments)
    sae, config = saved_sae(arguments.path, given)
    pipeline = build_pipeline(config, evaluated=sae, progress=progress)
    sae.to(pipeline.residual.device)
    subject, plan = _prepared(arguments, sae, pipeline, output, given.get("seed", 0))

    def told(title: str) -> Any:
        return streamed([f"{title}: {prompt}" for prompt in plan.prompts])

    result = steer_texts(subject, plan, output, streamed=told if arguments.stream else None, progress=progress)
    if not arguments.stream:
        print_texts(result)
    print_result(result)
    print(f"\nresult   {output / RESULT_FILE}\npage     {output / PAGE_FILE}")


def _prepared(arguments: Namespace, sae: Any, pipeline: Pipeline, output: Path, seed: int) -> tuple[Subject, Plan]:
    """What is steered, and what is done, with what no flag says found out."""
    from fastsae.disk import name_of
    from fastsae.interpret.examine import EXAMPLES, examples_of
    from fastsae.interpret.store import HEADER
    from fastsae.steering.options import Plan, Subject, check
    from fastsae.steering.select import Chosen, choose

    dynamic = arguments.dynamic if arguments.dynamic is not None else DYNAMIC if arguments.mode == "add" else ()
    if arguments.dynamic is None and arguments.unit != "absolute":
        dynamic = tuple(name for name in dynamic if name != "set_point")
    prompts = tuple(arguments.prompt or _prompts(pipeline))
    plan = Plan(
        (), prompts, arguments.alpha, arguments.mode, arguments.unit, arguments.positions, dynamic, None,
        arguments.max_new_tokens, arguments.temperature, seed,
    )  # fmt: skip
    check(plan)
    progress = not arguments.quiet
    if arguments.feature is not None:
        for feature in arguments.feature:
            if not 0 <= feature < sae.d_sae:
                raise UsageError(
                    f"--feature: expected 0 to {sae.d_sae - 1} (the SAE has {sae.d_sae:,} features), got {feature}"
                )
        chosen = [Chosen(feature, "--feature") for feature in arguments.feature]
    else:
        chosen = choose(arguments.select, arguments.top, sae, pipeline, output, progress=progress)
    maxima = {}
    if arguments.unit == "max" or (output / EXAMPLES / HEADER).exists():
        store = examples_of(sae, pipeline, output, seed=0, progress=progress)
        maxima = {one.feature: store.examples(one.feature).maximum for one in chosen if store.counts[one.feature]}
    config = pipeline.config
    subject = Subject(
        name_of(arguments.path), name_of(config.model), sae, pipeline.residual, pipeline.tokenizer, maxima
    )
    instruction = arguments.instruction or _instruction(subject, [one.feature for one in chosen])
    return subject, replace(plan, chosen=tuple(chosen), instruction=None if instruction == "none" else instruction)


def _prompts(pipeline: Pipeline) -> list[str]:
    """The user's first turns of the first held-out dialogues, those that are short."""
    turns = (turn["content"] for i in pipeline.held_out for turn in pipeline.dialogues[i][:2] if turn["role"] == "user")
    found = [text for text in turns if text.strip() and len(text) <= _LONGEST_PROMPT][:N_PROMPTS]
    if not found:
        raise UsageError(
            f"--prompt: expected one, as no held-out dialogue begins with at most {_LONGEST_PROMPT} characters"
        )
    return found


def _instruction(subject: Subject, features: list[int]) -> str:
    """Asks for the words that the features raise; "none" where they raise none."""
    from fastsae.interpret.logits import feature_logits

    direction = subject.sae.W_dec.detach()[features].sum(0, keepdim=True)
    found = feature_logits(subject.residual.model, direction, _N_RAISED)
    raised = [token for token, _ in found[0].positive] if found else []
    begins = [str(token)[:1] in _WORD_BEGINS for token in subject.tokenizer.convert_ids_to_tokens(raised)]
    texts = [
        subject.tokenizer.decode([token]).strip() for token, is_word in zip(raised, begins, strict=True) if is_word
    ]
    words = [text for text in texts if re.fullmatch(r"[^\W\d_]{3,}", text)]
    words = list(dict.fromkeys(words))[:_N_WORDS]
    return f"Use words such as {', '.join(words)} in your answer." if len(words) > 1 else "none"


def _output_of(arguments: Namespace) -> Path:
    if arguments.output is not None:
        return Path(arguments.output)
    folder = local_path(arguments.path)
    if not folder.is_dir():
        raise UsageError(f"--output: expected a folder for the results, because {folder} is no folder of this machine")
    return folder


def _whole_numbers(text: str) -> list[int]:
    return [whole_number(part) for part in text.split(",")]


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.replace("-", "_").split(","))


def _alphas(text: str) -> tuple[float, ...] | None:
    """Doses; None for auto."""
    if text in ("auto", "paper"):
        return PAPER_ALPHAS if text == "paper" else None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between them, paper or auto, got {text!r}"
        ) from None
