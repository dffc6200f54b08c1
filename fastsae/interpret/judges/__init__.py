"""Judges: who tells what a feature stands for."""

from __future__ import annotations

import re
from typing import Any

from fastsae.errors import UsageError, shown
from fastsae.interpret.judges.causal_model import CausalModel
from fastsae.interpret.judges.client import Client, EndpointOptions
from fastsae.interpret.judges.embedding import EmbeddingJudge
from fastsae.interpret.judges.endpoint import EndpointJudge
from fastsae.interpret.judges.local import LocalJudge
from fastsae.interpret.judges.protocol import Judge

__all__ = ["EndpointOptions", "Judge", "make_judge"]


def make_judge(
    name: str,
    tokenizer: Any,
    *,
    endpoint: EndpointOptions | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Judge:
    """Makes a judge.

    Args:
        name: `embedding`, which works offline; `hf:MODEL` with a folder or hub id of a causal language model; or
            `openai:MODEL@URL` with any OpenAI-compatible endpoint.
        tokenizer: The one whose ids the windows hold.
        endpoint: How an endpoint is asked.
        device: Where the model of `hf:` runs.
        progress: Show progress bars.

    Raises:
        UsageError: There is no such judge.
        FastsaeError: It lacks a package, a model or a key; the message says what to do.
    """
    if name == "embedding":
        return EmbeddingJudge(tokenizer)
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return LocalJudge(name, CausalModel(rest, device=device, progress=progress), tokenizer)
    found = re.fullmatch(r"(.+?)@(https?://.+)", rest) if kind == "openai" else None
    if found:
        client = Client(found[1], found[2], endpoint or EndpointOptions(), progress=progress)
        return EndpointJudge(name, client, tokenizer)
    raise UsageError(f"judge: expected embedding, hf:MODEL or openai:MODEL@URL, got {shown(name)}")
