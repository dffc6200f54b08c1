"""Fingerprints of a run's data and model, by which a resumed run notices that they are others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

SAMPLE = 20_000  # dialogues that are read again, evenly spread; about a second
VALUES = 64  # numbers that are read of each weight


def of_dialogues(dialogues: Sequence[Any], limit: int | None = None) -> str:
    """Tells datasets apart by their number of dialogues and the content and order of up to `SAMPLE` of them.

    Args:
        dialogues: The dataset, of dialogues or of texts.
        limit: Only so many of its first dialogues are used.
    """
    n = min(len(dialogues), limit or len(dialogues))
    found = hashlib.blake2b(str(n).encode(), digest_size=16)
    for index in range(0, n, -(-n // SAMPLE) or 1):
        # as ASCII, in which any text can be written, lone surrogates too
        found.update(json.dumps(dialogues[index], sort_keys=True).encode("ascii"))
    return found.hexdigest()


def of_model(model: Any, tokenizer: Any) -> str:
    """Tells models apart by their shapes, some values of each weight, and the chat template; takes milliseconds.

    Values are rounded to bf16, so that a model has one fingerprint in whichever dtype it is loaded.
    """
    found = hashlib.blake2b(digest_size=16)
    for weight in model.parameters():
        found.update(str(tuple(weight.shape)).encode())
        values = weight.detach().reshape(-1)[:: max(1, weight.numel() // VALUES)][:VALUES]
        found.update(values.float().to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    found.update(json.dumps([len(tokenizer), getattr(tokenizer, "chat_template", None)], default=str).encode())
    return found.hexdigest()
