"""A tokenizer's chat template: chosen among several, tried on a plain dialogue, and applied to any."""

from __future__ import annotations

import logging
from itertools import combinations, product
from typing import Any

from fastsae.data.chat import Dialogue
from fastsae.data.roles import without_lone_surrogates
from fastsae.errors import FastsaeError, UsageError

_TURNS: Dialogue = [
    {"role": "user", "content": "firstquestion"},
    {"role": "assistant", "content": "firstanswer"},
    {"role": "user", "content": "secondquestion"},
    {"role": "assistant", "content": "secondanswer"},
]
_ROLES = ("system", "user", "assistant")
_PROBES: tuple[Dialogue, ...] = ([{"role": "system", "content": "instruction"}, *_TURNS], _TURNS)

_LARGEST_NUMBER = 1_000_000  # in a template; no real one comes near, and `'x' * 10**10` would take all memory

logger = logging.getLogger(__name__)


class RefusedDialogueError(FastsaeError):
    """The chat template cannot write a dialogue; `reason` says why in a clause that holds nothing of its text."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ChatTemplate:
    """The chat template of a tokenizer.

    Some templates read the content of a turn as a list of parts and write nothing of a plain string, some of them for the
    user's turns alone. A short dialogue, written in all ways, shows which one this template takes.

    Attributes:
        parts_of: The roles whose content is handed over as `[{"type": "text", "text": ...}]`; other roles get what the
            user gets.
        lost_roles: The roles whose text the template leaves out of an ordinary dialogue.

    Raises:
        UsageError: There is no template, or several and none of them is the default, or it is not valid, or it computes with
            huge numbers, or it writes nothing of what a dialogue says.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.name = repr(getattr(tokenizer, "name_or_path", ""))
        self._options = _chosen(tokenizer, self.name)
        _check_numbers(self._options.get("chat_template") or tokenizer.chat_template, self.name)
        self.parts_of, self.lost_roles = self._probe()

    @property
    def takes_parts(self) -> bool:
        """Whether any role's content is handed over as a list of parts."""
        return bool(self.parts_of)

    def text(self, dialogue: Dialogue, *, add_generation_prompt: bool = False) -> str:
        """Returns the whole dialogue as text.

        Args:
            dialogue: Its turns.
            add_generation_prompt: End with what stands before the assistant's next words, where the template knows it.

        Raises:
            RefusedDialogueError: The template refuses it, or fails on it with whatever error.
        """
        from jinja2 import TemplateError

        try:
            return self._write(dialogue, self.parts_of, add_generation_prompt)
        except Exception as error:  # a template is a program by somebody else, which can fail with anything
            roles = ", ".join(message["role"][:40] for message in dialogue[:20])
            if type(error) is TemplateError:  # by the template's own `raise_exception`
                reason, found = "the chat template refused it", str(error)
            else:
                kind = type(error).__name__
                reason, found = f"the chat template raised an error ({kind})", f"{kind}: {error}"
            message = f"the chat template refuses a dialogue with the roles {roles}: {found[:300]}"
            raise RefusedDialogueError(message, reason) from error

    def warn_of_lost_text(self) -> None:
        """Logs a warning where the template leaves out what some role says."""
        if self.lost_roles:
            logger.warning(
                "the chat template of %s leaves out text of these roles: %s; the model never sees it",
                self.name,
                ", ".join(self.lost_roles),
            )

    def _write(self, dialogue: Dialogue, parts_of: tuple[str, ...], add_generation_prompt: bool = False) -> str:
        turns: list[dict[str, Any]] = [dict(message) for message in dialogue]
        for turn in turns:
            if (turn["role"] if turn["role"] in _ROLES else "user") in parts_of:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
        )
        return without_lone_surrogates(text)

    def _probe(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns `parts_of` and `lost_roles`."""
        from jinja2 import TemplateSyntaxError

        best: tuple[int, tuple[str, ...], tuple[str, ...]] = (-1, (), ())
        ways = [roles for n in (0, 3, 1, 2) for roles in combinations(_ROLES, n)]  # the usual ones first
        for parts_of, probe in product(ways, _PROBES):
            try:
                text = self._write(probe, parts_of).lower()
            except TemplateSyntaxError as error:
                raise UsageError(
                    f"the chat template of {self.name} is not valid: {error.message} in line {error.lineno}"
                ) from error
            except Exception:  # it refuses system turns, say, or this form of content
                continue
            if parts_of and "'type': 'text'" in text.replace('"', "'"):  # it writes the list itself, as Python or JSON
                continue
            lost = [message["role"] for message in probe if message["content"] not in text]
            found = sum(message["content"] in text for message in probe)
            if found > best[0]:
                best = found, parts_of, tuple(dict.fromkeys(lost))
        if best[0] == 0:
            raise UsageError(
                f"the chat template of {self.name} writes nothing of what a dialogue says, neither where its content is "
                "a string nor where it is a list of text parts. Save another template with the tokenizer"
            )
        return best[1:]  # where it refuses even these, every dialogue of the dataset is still tried


def _chosen(tokenizer: Any, name: str) -> dict[str, str]:
    """What `apply_chat_template` needs to be told: the template, where there are several."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, (list, tuple)):
        found = {entry["name"]: entry["template"] for entry in found}
    if not found:
        raise UsageError(
            f"the tokenizer {name} has no chat template. Choose an instruction-tuned model, or set "
            "`tokenizer.chat_template` and save the tokenizer beside the model"
        )
    if not isinstance(found, dict):
        return {}
    if "default" not in found and len(found) > 1:
        raise UsageError(
            f"the tokenizer {name} has several chat templates and none of them is named 'default': "
            f"{', '.join(map(repr, sorted(found)))}. Set `tokenizer.chat_template` to one of them and save the tokenizer"
        )
    return {"chat_template": found.get("default") or next(iter(found.values()))}


def _check_numbers(template: str, name: str) -> None:
    """Raises UsageError where a template holds a huge number or a power: with them a few letters can fill the memory.

    They are found before jinja compiles the template, which computes products of constants already then.
    """
    from jinja2 import Environment, TemplateSyntaxError

    before = ""
    try:
        for _, kind, word in Environment().lex(template):
            is_huge = kind in ("integer", "float") and abs(_number(word)) > _LARGEST_NUMBER
            is_power = word == "**" and kind == "operator" and before not in ("(", ",")  # there it hands arguments on
            if is_huge or is_power:
                raise UsageError(
                    f"the chat template of {name}: expected no powers and no numbers above {_LARGEST_NUMBER:,}, which can "
                    f"make a text that fills the memory, got {word[:40]}. Save another template with the tokenizer"
                )
            before = before if kind == "whitespace" else word
    except TemplateSyntaxError:
        return  # the first text that is written says what is wrong


def _number(word: str) -> float:
    try:
        return float(int(word, 0))
    except ValueError:
        return float(word.replace("_", ""))
    except OverflowError:
        return float("inf")
