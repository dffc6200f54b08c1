"""From a dialogue or a plain text to token ids: the model's own chat template, and never two BOS tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsae.data.chat import Dialogue
from fastsae.data.chat_template import ChatTemplate, RefusedDialogueError
from fastsae.data.dropped import Dropped

# A text much longer than `max_length` tokens is not tokenised whole, but to the first of so many characters per token.
# The last tokens of a text that was cut can differ from those of the whole text. The longest token of a vocabulary has usually
# 128 characters; where the cut goes through it, as many tokens of one character stand in its place.
_CHARACTERS_PER_TOKEN = 16
_UNSURE = 256


def render(
    tokenizer: Any, dialogue: Dialogue, max_length: int = 8192, *, add_generation_prompt: bool = False
) -> list[int]:
    """Return the token ids of a whole dialogue in the tokenizer's chat template, cut off at `max_length`.

    A template that writes a BOS token where the dialogue already starts with one gives one BOS. With `add_generation_prompt`
    it ends with what stands before the assistant's next words.

    Raises:
        UsageError: The tokenizer has no chat template.
        FastsaeError: The template refuses the dialogue, for instance a system turn that the model does not know.
    """
    text = ChatTemplate(tokenizer).text(dialogue, add_generation_prompt=add_generation_prompt)
    return tokenize(tokenizer, [text], max_length)[0]


def doubles_bos(tokenizer: Any, dialogue: Dialogue) -> bool:
    """Whether the chat template writes two BOS tokens in front of a dialogue, of which `render` leaves one."""
    text = ChatTemplate(tokenizer).text(dialogue)
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(text, add_special_tokens=False)["input_ids"][:2] == [bos, bos]


class TokenRows:
    """The token ids of a dataset's items, and why some of them cannot be used.

    An item is a dialogue, whose tokens are all written by the chat template; a plain text, which gets the tokenizer's BOS
    token in front, where it has one; or a list of token ids, taken as it is.

    Args:
        dialogues: The dataset, with items of one kind.
        tokenizer: A tokenizer, with a chat template where the items are dialogues.
        max_length: Tokens after which an item is cut off.
        n_embeddings: Number of tokens that the model has an embedding for; items with others are dropped.

    Attributes:
        refusal: A sentence on the last error of the template or the tokenizer; empty where there was none.

    Raises:
        UsageError: The tokenizer has no usable chat template.
    """

    def __init__(self, dialogues: Sequence[Any], tokenizer: Any, max_length: int, n_embeddings: int | None) -> None:
        self.dialogues, self.tokenizer, self.max_length = dialogues, tokenizer, max_length
        self.n_embeddings, self.refusal = n_embeddings, ""
        self.template = ChatTemplate(tokenizer) if are_dialogues(dialogues) else None

    def read(self, indices: Sequence[int]) -> tuple[list[tuple[int, list[int]]], Dropped]:
        """The (index, token ids) of those of `indices` that can be used, and the count of the others."""
        drops, texts, rows = Dropped(seen=len(indices)), dict[int, str](), dict[int, list[int]]()
        for index in indices:
            item = self.dialogues[index]
            if self.template is None:
                if isinstance(item, str):
                    texts[index] = (self.tokenizer.bos_token or "") + item
                else:
                    rows[index] = item[: self.max_length]
                continue
            try:
                texts[index] = self.template.text(item)
            except RefusedDialogueError as error:
                self._drop(drops, index, error.reason)
                self.refusal = f"The last refusal: {error}"
        try:
            rows |= zip(texts, tokenize(self.tokenizer, list(texts.values()), self.max_length), strict=True)
        except Exception:  # a text that the tokenizer cannot take: find it
            rows |= {i: ids for i, text in texts.items() if (ids := self._tokens(drops, i, text)) is not None}
        return [(index, ids) for index, ids in rows.items() if self._is_usable(drops, index, ids)], drops

    def _is_usable(self, drops: Dropped, index: int, ids: list[int]) -> bool:
        """Whether the model can run on these tokens; counts the dialogue as dropped where not."""
        if len(ids) < 2:
            self._drop(drops, index, "it has fewer than 2 tokens")
            return False
        if min(ids) < 0 or (self.n_embeddings is not None and max(ids) >= self.n_embeddings):
            self._drop(drops, index, "the model has no embedding for one of its tokens")
            return False
        return True

    def _tokens(self, drops: Dropped, index: int, text: str) -> list[int] | None:
        try:
            return tokenize(self.tokenizer, [text], self.max_length)[0]
        except Exception as error:
            self._drop(drops, index, f"the tokenizer raised an error ({type(error).__name__})")
            self.refusal = f"The last error of the tokenizer: {str(error)[:300]}"
            return None

    def _drop(self, drops: Dropped, index: int, reason: str) -> None:
        rows = getattr(self.dialogues, "kept_rows", None)
        drops.add(reason, [index if rows is None else int(rows[index])])


def are_dialogues(dialogues: Sequence[Any]) -> bool:
    """Whether the items of a dataset are dialogues, and not plain texts or lists of token ids."""
    first: Any = next((item for item in dialogues if len(item)), [{}])
    return not isinstance(first, str) and isinstance(first[0], dict)


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of texts that hold every special token already, so that the tokenizer adds none; of two BOS one stays."""
    if not texts:
        return []
    n_characters = _CHARACTERS_PER_TOKEN * (max_length + _UNSURE)
    # `verbose=False`: no warning about texts longer than the model's context; they are cut off here.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids_of = tokenizer([text[:n_characters] for text in texts], **options)["input_ids"]
    bos = tokenizer.bos_token_id
    cut = []
    for text, ids in zip(texts, ids_of, strict=True):
        n_read = n_characters
        while n_read < len(text) and len(ids) < max_length + _UNSURE:  # few tokens, of many characters each
            n_read *= 8
            ids = tokenizer([text[:n_read]], **options)["input_ids"][0]
        start = 1 if bos is not None and ids[:2] == [bos, bos] else 0
        cut.append(list(ids[start : start + max_length]))
    return cut
