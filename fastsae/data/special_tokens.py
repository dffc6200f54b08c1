"""The tokens that a chat template writes around turns: special tokens by their id, role names by their position."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.data.chat import Dialogue
from fastsae.data.tokens import render
from fastsae.errors import FastsaeError, UsageError

logger = logging.getLogger(__name__)

_ROLES = ("user", "assistant")
_START = -1  # stands before the first token of a dialogue, where a template's first header has no special token
_CONTENTS = [f"zqx{i}" for i in range(6)]  # no template writes these
_SYSTEM = "zqx6"


class RoleHeader(NamedTuple):
    """A role's name as the template writes it: the tokens from the last special token on, and then those of the name."""

    before: tuple[int, ...]
    name: tuple[int, ...]


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens whose reconstruction the special-token MSE measures.

    Attributes:
        ids: Token to id, for the special tokens that the template writes around turns.
        roles: Name of a role to the headers that mark it. Only the name's tokens count, and only behind the header's others:
            the same word inside a message is an ordinary word. The user's stands first.
        leads: The special tokens behind which somebody speaks: 0 for the user alone, 1 for the assistant alone, None for
            whoever was named before. One that also ends a turn says nothing, unless one role's turns alone begin with it.
        system: The headers that mark a system prompt, where a word or a special token of its own does. They are no names of
            roles: the paper's lists leave them out.
    """

    ids: dict[str, int] = field(default_factory=dict)
    roles: dict[str, tuple[RoleHeader, ...]] = field(default_factory=dict)
    leads: dict[int, int | None] = field(default_factory=dict)
    system: tuple[RoleHeader, ...] = ()

    @property
    def names(self) -> list[str]:
        """A name for each class: the special tokens, then the roles."""
        return [*self.ids, *self.roles]

    def classes(self, input_ids: Tensor) -> Tensor:
        """Return for every token the index of its name in `names`, or `len(names)` where it is not special.

        Args:
            input_ids: `[B, T]` whole dialogues from their first token on, padded on the right.
        """
        found = torch.full_like(input_ids, len(self.names))
        for index, token in enumerate(self.ids.values()):
            found[input_ids == token] = index
        for index, headers in enumerate(self.roles.values(), start=len(self.ids)):
            found[_is_name(input_ids, headers)] = index
        return found

    def names_system(self, input_ids: Tensor) -> Tensor:
        """Returns for every token whether it is the name behind which a system prompt stands; `input_ids` as in `classes`."""
        return _is_name(input_ids, self.system)


def _is_name(input_ids: Tensor, headers: Sequence[RoleHeader]) -> Tensor:
    """Whether each token belongs to the name of one of the headers."""
    padded = torch.nn.functional.pad(input_ids, (1, 0), value=_START)
    found = torch.zeros_like(padded, dtype=torch.bool)
    for before, name in headers:
        length = len(before) + len(name)
        if length > padded.shape[1]:
            continue
        pattern = torch.tensor([*before, *name], dtype=input_ids.dtype, device=input_ids.device)
        rows, starts = (padded.unfold(1, length, 1) == pattern).all(-1).nonzero(as_tuple=True)
        for offset in range(len(before), length):
            found[rows, starts + offset] = True
    return found[:, 1:]


def find_special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the special tokens and role names that the tokenizer's chat template writes around turns.

    The BOS token before the first turn is not one of them. That gives the paper's lists: `<|im_start|>`, `<|im_end|>`, user,
    assistant for Qwen, and `<|start_header_id|>`, `<|end_header_id|>`, `<|eot_id|>`, user, assistant for Llama 3. A role's
    name counts where it follows a special token, in however many tokens; a template of plain text may give none.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        UsageError: The tokenizer has no chat template.

    Source: arXiv:2506.07691, table 11.
    """
    ids = _render_probe(tokenizer)
    special = _special_ids(tokenizer, ids)
    segments = list(_segments(ids, special))
    roles, leads = _roles(tokenizer, segments), _leads(tokenizer, segments)
    if ids and ids[0] == tokenizer.bos_token_id and ids[0] not in ids[1:]:
        special.discard(ids[0])
        leads.pop(ids[0], None)
    names = {_decode(tokenizer, [i]): i for i in dict.fromkeys(ids) if i in special}
    return SpecialTokens(names, roles, leads, _system(tokenizer, roles, leads))


def _render_probe(tokenizer: Any) -> list[int]:
    """Token ids of a plain dialogue of three exchanges, or of fewer where the template refuses that; none if it refuses all."""
    for n_messages in (6, 4, 2):
        try:
            return render(tokenizer, _probe(n_messages))
        except UsageError:
            raise
        except FastsaeError as error:
            refusal = error
    logger.warning("no special tokens are told apart from others: %s", refusal)
    return []


def _probe(n_messages: int) -> Dialogue:
    return [{"role": _ROLES[i % 2], "content": content} for i, content in enumerate(_CONTENTS[:n_messages])]


def _special_ids(tokenizer: Any, ids: Sequence[int]) -> set[int]:
    """The special tokens among `ids`.

    Some vocabularies do not declare their turn markers special, and some list ordinary text such as line breaks as added
    tokens. So an added token that is not declared special counts if it is visible and written in every exchange.
    """
    added = tokenizer.added_tokens_decoder
    special = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    special |= {index for index, token in added.items() if token.content.strip() and ids.count(index) >= 3}
    return (special & set(ids)) - {tokenizer.unk_token_id}


def _segments(ids: Sequence[int], special: set[int]) -> Iterator[tuple[int, list[int]]]:
    """The start of the dialogue and every special token, each with the ordinary tokens that follow it."""
    lead, tokens = _START, list[int]()
    for index in ids:
        if index in special:
            yield lead, tokens
            lead, tokens = index, []
        else:
            tokens.append(index)
    yield lead, tokens


def _roles(tokenizer: Any, segments: list[tuple[int, list[int]]]) -> dict[str, tuple[RoleHeader, ...]]:
    """The names that tell the two roles apart, with their headers; none unless the template writes both."""
    texts = [_decode(tokenizer, tokens) for _, tokens in segments]
    roles: dict[str, tuple[RoleHeader, ...]] = {}
    # a message of the user and one of the assistant; templates may treat the first and the last message differently
    for message in (2, 1):
        start = 1 + next((i for i, text in enumerate(texts) if _CONTENTS[message - 1] in text), len(texts))
        header = _header(texts, start, _CONTENTS[message])
        name = re.search(r"(\w+)\W*$", header)
        if name is None or name[1] in roles:
            return {}
        header = header[: name.end(1)]
        starts = [(lead, tokens) for lead, tokens in segments if _decode(tokenizer, tokens).lstrip().startswith(header)]
        found = [_role_header(tokenizer, lead, tokens, header, name.start(1)) for lead, tokens in starts]
        roles[name[1]] = tuple(dict.fromkeys(found))
    return roles


def _system(
    tokenizer: Any, roles: dict[str, tuple[RoleHeader, ...]], leads: dict[int, int | None]
) -> tuple[RoleHeader, ...]:
    """The header of a system prompt; none where templates refuse one, or write it into a message of the user."""
    try:
        ids = render(tokenizer, [{"role": "system", "content": _SYSTEM}, *_probe(2)])
    except FastsaeError:
        return ()
    segments = list(_segments(ids, _special_ids(tokenizer, ids)))
    texts = [_decode(tokenizer, tokens) for _, tokens in segments]
    spoken = next((i for i, text in enumerate(texts) if _SYSTEM in text), None)
    if spoken is None or not (roles or leads):  # where nothing tells who speaks, nothing tells where the prompt ends
        return ()
    own = segments[spoken][0]
    if own not in (*leads, _START, tokenizer.bos_token_id):
        return (RoleHeader((), (own,)),)
    header = _header(texts[: spoken + 1], 0, _SYSTEM)
    name = re.search(r"(\w+)\W*$", header)
    if name is None or name[1] in roles or not roles:
        return ()
    header = header[: name.end(1)]
    lead, tokens = next(one for one, text in zip(segments, texts, strict=True) if text.lstrip().startswith(header))
    return (_role_header(tokenizer, lead, tokens, header, name.start(1)),)


def _leads(tokenizer: Any, segments: list[tuple[int, list[int]]]) -> dict[int, int | None]:
    """The special tokens behind which the user, the assistant, or either of them speaks."""
    before: tuple[set[int], set[int]] = (set(), set())
    behind = set()
    for (lead, tokens), following in zip(segments, [*segments[1:], (_START, [])], strict=True):
        text = _decode(tokenizer, tokens)
        for i, content in enumerate(_CONTENTS):
            if content in text:
                before[i % 2].add(lead)
                behind.add(following[0])
    user, assistant = before
    either = dict.fromkeys((user & assistant) - behind, None)
    return {**either, **dict.fromkeys(user - assistant, 0), **dict.fromkeys(assistant - user, 1)}


def _header(texts: Sequence[str], start: int, message: str) -> str:
    """The first line with a word that the template writes between the start of the text `start` and a message, else ""."""
    end = next((i for i in range(start, len(texts)) if message in texts[i]), start - 1)
    for text in texts[start : end + 1]:
        header = text.partition(message)[0].strip()
        if re.search(r"\w", header):
            return header.splitlines()[0]
    return ""


def _role_header(tokenizer: Any, lead: int, tokens: list[int], header: str, name_start: int) -> RoleHeader:
    """Splits `tokens`, whose text begins with `header`, before and behind the role's name, which ends the header."""
    text = _decode(tokenizer, tokens)
    margin = len(text) - len(text.lstrip())
    prefixes = [_decode(tokenizer, tokens[:n]) for n in range(len(tokens) + 1)]
    start = max(n for n, prefix in enumerate(prefixes) if len(prefix) <= margin + name_start)
    end = next(n for n, prefix in enumerate(prefixes) if prefix.startswith(text[: margin + len(header)]))
    return RoleHeader((lead, *tokens[:start]), tuple(tokens[start:end]))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
