"""The embedded default: chat dialogues from the documentation that is installed anyway, and a small chat model.

    load_dialogues()   more than 20,000 dialogues about the Python standard library, torch and numpy
    plain_text()       the same documentation as plain text documents
    model_path()       the folder of the shipped Qwen2-architecture chat model (weights, tokenizer, chat template)

The dialogues are made at run time from docstrings and signatures, which are read with `ast` and never imported or
executed, so their content depends on the installed versions of Python, torch and numpy. For given versions it is the
same in every process and on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastsae.data.demo.corpus import load_entries
from fastsae.data.demo.dialogues import Dialogue, Message, entry_text, make_dialogues
from fastsae.data.progress import with_bar
from fastsae.errors import FastsaeError

__all__ = ["HELD_OUT", "Dialogue", "Message", "load_dialogues", "model_path", "plain_text"]

HELD_OUT = 1000
"""The last so many of `load_dialogues()` are held out: the shipped model was not trained on them.

That holds for the versions of Python, torch and numpy named in the model's README; others give other dialogues.
"""


_MADE: list[Dialogue] = []  # once in a process


def load_dialogues(limit: int | None = None, *, progress: bool = False) -> list[Dialogue]:
    """The demo dialogues (the first `limit` of them) in a fixed shuffled order, as fresh lists of messages.

    The first call reads the installed sources (seconds, then cached on disk) and writes the dialogues (a few seconds).
    The last `HELD_OUT` of all of them are the held-out split of the shipped model. `progress` shows bars meanwhile.
    """
    return [[dict(message) for message in dialogue] for dialogue in _all_dialogues(progress)[:limit]]


def plain_text() -> Iterator[str]:
    """The same documentation as plain text, one document per module, class, function or method."""
    return (entry_text(entry) for entry in load_entries())


def model_path() -> Path:
    """Folder of the shipped chat model, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`.

    Raises:
        FastsaeError: the folder is missing from this installation.
    """
    path = Path(__file__).parent / "model"
    if not (path / "config.json").is_file():
        raise FastsaeError(
            f"the demo model is missing: expected {path / 'config.json'}; reinstall fastsae, "
            "or train it in a checkout of the sources with `python -m tools.demo_model`"
        )
    return path


def _all_dialogues(progress: bool) -> list[Dialogue]:
    if not _MADE:
        entries = load_entries(progress=progress)
        _MADE.extend(make_dialogues(with_bar(entries, "writing", "entry", total=len(entries), progress=progress)))
    return _MADE
