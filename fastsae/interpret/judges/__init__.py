"""Judges: who tells what a feature stands for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fastsae.errors import UsageError, shown
from fastsae.interpret.embedder import static_embeddings
from fastsae.interpret.judges.causal_model import CausalModel
from fastsae.interpret.judges.client import Client, EndpointOptions
from fastsae.interpret.judges.embedding import EmbeddingJudge
from fastsae.interpret.judges.endpoint import EndpointJudge
from fastsae.interpret.judges.local import LocalJudge
from fastsae.interpret.judges.protocol import Judge

__all__ = ["EndpointOptions", "Judge", "judge_maker"]


def judge_maker(
    name: str,
    *,
    endpoint: EndpointOptions | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Callable[[Any], Judge]:
    """What makes a judge of the tokenizer whose ids the windows hold; a key or a package that is missing is told at once.

    Args:
        name: `embedding`, which works offline; `hf:MODEL` with a folder or hub id of a causal language model, loaded when
            the judge is made; or `openai:MODEL@URL` with any OpenAI-compatible endpoint.
        endpoint: How an endpoint is asked.
        device: Where the model of `hf:` runs.
        progress: Show progress bars.

    Raises:
        UsageError: There is no such judge.
        FastsaeError: It lacks a package or a key; the message says what to do.
    """
    if name == "embedding":
        static_embeddings()
        return EmbeddingJudge
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return lambda tokenizer: LocalJudge(name, CausalModel(rest, device=device, progress=progress), tokenizer)
    found = re.fullmatch(r"(.+?)@(https?://.+)", rest) if kind == "openai" else None
    if found:
        client = Client(found[1], found[2], endpoint or EndpointOptions(), progress=progress)
        return lambda tokenizer: EndpointJudge(name, client, tokenizer)
    raise UsageError(f"judge: expected embedding, hf:MODEL or openai:MODEL@URL, got {shown(name)}")
