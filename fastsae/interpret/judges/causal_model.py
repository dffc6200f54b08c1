"""What a local language model would say next: log-probabilities of a few answers, in batches, and short continuations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.data.language_model import load_model
from fastsae.data.progress import bar
from fastsae.errors import FastsaeError
from fastsae.evaluate.dialogues import FloatArray

_BATCH_TOKENS = 4096  # tokens of a batch, padding included


class CausalModel:
    """Answers prompts by one forward pass; prompts that begin alike share the pass over what they have in common.

    Args:
        name: A folder, a GGUF file or a hub id of a causal language model.
        device: Where it runs.
        progress: Show progress bars.

    Raises:
        UsageError: There is no such model, or it has no tokenizer.
        FastsaeError: It cannot be loaded.
    """

    def __init__(self, name: str, *, device: str = "cpu", progress: bool = False) -> None:
        self._model, self._tokenizer = load_model(name, device=device, progress=progress)
        self._name, self._progress = name, progress
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._has_template = self._tries_template()
        self.counts = {"prompts": 0, "tokens": 0}

    def choose(self, groups: Sequence[Sequence[str]], lead: str, options: Sequence[str], what: str) -> list[FloatArray]:
        """Log-probabilities of the options to come next, `[len(group), len(options)]` for each group; those of a prompt sum to 1.

        Args:
            groups: Prompts; those of a group begin alike.
            lead: How the answer begins, such as `Answer:`.
            options: Words, of which each begins with another token.
            what: What the progress bar says.
        """
        lead_ids, option_ids = self._options(lead, options)
        encoded = [[self._encode(prompt) + lead_ids for prompt in group] for group in groups]
        found = [np.zeros((len(group), len(options))) for group in groups]
        places = [(i, j) for i, group in enumerate(encoded) for j in range(len(group)) if len(group) == 1]
        with bar(what, "prompt", total=sum(map(len, groups)), progress=self._progress) as advance:
            for batch in _batches([encoded[i][j] for i, j in places]):
                logits = self._last_logits([encoded[i][j] for i, j in (places[k] for k in batch)])
                for k, row in zip(batch, logits, strict=True):
                    found[places[k][0]][places[k][1]] = _log_shares(row[option_ids])
                advance(len(batch))
            for i, group in enumerate(encoded):
                if len(group) > 1:
                    found[i][:] = _log_shares(self._after_common_start(group)[:, option_ids])
                    advance(len(group))
        return found

    def write(self, prompts: Sequence[str], lead: str, max_tokens: int, what: str) -> list[str]:
        """The most likely continuation of each prompt, up to so many tokens or the end of its line."""
        from transformers import GenerationConfig

        lead_ids, _ = self._options(lead, ())
        encoded = [self._encode(prompt) + lead_ids for prompt in prompts]
        pad = self._pad()
        config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad)
        config.eos_token_id = self._tokenizer.eos_token_id
        texts = [""] * len(prompts)
        with bar(what, "prompt", total=len(prompts), progress=self._progress) as advance:
            for batch in _batches(encoded):
                ids, mask = self._padded([encoded[k] for k in batch], left=True)
                with torch.inference_mode():
                    written = self._model.generate(ids, attention_mask=mask, generation_config=config)
                for k, row in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
                    text = self._tokenizer.decode(row, skip_special_tokens=True).strip()
                    texts[k] = text.splitlines()[0].strip() if text else ""
                self._count([encoded[k] for k in batch], max_tokens)
                advance(len(batch))
        return texts

    def _tries_template(self) -> bool:
        if not getattr(self._tokenizer, "chat_template", None):
            return False
        try:
            return "theme" in self._templated("theme")
        except Exception:  # a template may want another form of dialogue, and says so in any way it likes
            return False

    def _templated(self, prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(self._tokenizer.apply_chat_template(turn, **options))

    def _encode(self, prompt: str) -> list[int]:
        for special in self._tokenizer.all_special_tokens:  # words of a dialogue must not end the turn
            prompt = prompt.replace(special, f"[{special.strip('<|>[]')}]")
        if self._has_template:
            return self._ids(self._templated(prompt), add_special_tokens=False)
        return self._ids(prompt + "\n", add_special_tokens=True)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _options(self, lead: str, options: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens before the answer, and the first token of each option after them."""
        if not options:
            return self._ids(lead, add_special_tokens=False), []
        encoded = [self._ids(f"{lead} {option}", add_special_tokens=False) for option in options]
        shared = len(_common_start(encoded))
        following = [ids[shared] for ids in encoded if len(ids) > shared]
        if len(set(following)) < len(options):
            raise FastsaeError(
                f"judge hf:{self._name}: its tokenizer does not tell {', '.join(options)} apart by their first token; take "
                "another model"
            )
        return encoded[0][:shared], following

    def _last_logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Logits after the last token of each prompt, `[len(prompts), vocabulary]`."""
        ids, mask = self._padded(prompts)
        self._count(prompts)
        return self._logits(ids, mask, [len(prompt) for prompt in prompts])

    def _after_common_start(self, prompts: Sequence[list[int]]) -> Tensor:
        """The same for prompts that begin alike: their common start runs once."""
        start = _common_start(prompts)[: min(map(len, prompts)) - 1]  # at least one token of each is left
        with torch.inference_mode():
            head, _ = self._padded([start])
            passed = self._model(head, use_cache=True, **self._kept([len(start)])) if start else None
        cache = getattr(passed, "past_key_values", None)
        if cache is None or not hasattr(
            cache, "batch_repeat_interleave"
        ):  # models without attention keep something else
            return self._last_logits(prompts)
        cache.batch_repeat_interleave(len(prompts))
        rest = [prompt[len(start) :] for prompt in prompts]
        ids, mask = self._padded(rest)
        mask = torch.cat([mask.new_ones(len(rest), len(start)), mask], dim=1)
        self._count([start, *rest])
        return self._logits(ids, mask, list(map(len, rest)), past_key_values=cache)

    def _logits(self, ids: Tensor, mask: Tensor, lengths: Sequence[int], **options: Any) -> Tensor:
        last = torch.tensor(lengths, device=ids.device) - 1
        kept = self._kept(lengths)
        with torch.inference_mode():
            logits = self._model(ids, attention_mask=mask, **kept, **options).logits
        at = torch.searchsorted(kept["logits_to_keep"], last) if kept else last
        return logits[torch.arange(len(lengths), device=logits.device), at].float().cpu()

    def _kept(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Logits of a large vocabulary at every token would take gigabytes."""
        positions = torch.tensor(sorted({length - 1 for length in lengths}), device=self._model.device)
        return {"logits_to_keep": positions} if self._keeps else {}

    def _padded(self, prompts: Sequence[list[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad(), device=self._model.device)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            part = slice(width - len(prompt), None) if left else slice(len(prompt))
            ids[i, part] = torch.tensor(prompt, device=ids.device)
            mask[i, part] = 1
        return ids, mask

    def _pad(self) -> int:
        given = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(token for token in given if token is not None)

    def _count(self, prompts: Sequence[list[int]], written: int = 0) -> None:
        self.counts["prompts"] += len(prompts)
        self.counts["tokens"] += sum(map(len, prompts)) + written * len(prompts)


def _log_shares(logits: Tensor) -> FloatArray:
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def _common_start(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens with which all of them begin."""
    first, last = min(prompts), max(prompts)  # all others stand between them
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:n]


def _batches(prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Indices of prompts of about the same length, the longest first, so that a batch that does not fit shows at once."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if batch and (len(batch) + 1) * len(prompts[batch[0]]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
