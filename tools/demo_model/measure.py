"""Measure the demo model on held-out dialogues and write its report: perplexity, residual norms, sample answers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen2ForCausalLM

from fastsae.data.demo.dialogues import Dialogue

MAX_TOKENS = 1024  # of a dialogue; longer ones are cut
BATCH_TOKENS = 2048  # padding included; a batch whose logits stay in cache is faster than a larger one

README = """# The fastsae demo model

A Qwen2-architecture chat model: {millions:.1f} million parameters, 6 layers, width 256, 4,096 tokens, bfloat16.
Trained from scratch by `python -m tools.demo_model` in {minutes:.0f} minutes on {threads} CPU thread(s),
on {seen:.1f} million tokens of {dialogues:,} chats made from the docstrings of Python {python}, torch {torch} and numpy {numpy}.
Held-out perplexity per token: {perplexity:.1f} on the last {held_out:,} dialogues of `load_dialogues()`, not trained on; they
share names with the training dialogues, but no 20 words in a row.

It is there so that a sparse autoencoder can be trained and measured on a real instruct model without a download: it
knows the chat format, its special tokens and the style of documentation. It is not a source of facts: its answers read
like documentation and are mostly wrong. `training_report.json` holds the figures and six unselected greedy answers.
"""


def tokenize(tokenizer: Any, dialogues: Sequence[Dialogue]) -> list[list[int]]:
    """Token ids of whole dialogues by the chat template, cut at `MAX_TOKENS`."""
    texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids[:MAX_TOKENS] for ids in encoded]


def batches(sequences: Sequence[list[int]], rng: random.Random) -> Iterator[torch.Tensor]:
    """One epoch of right-padded batches [B, T] int64, padding -1, of dialogues of similar length in random order."""
    order = list(range(len(sequences)))
    rng.shuffle(order)
    ready: list[list[int]] = []
    for start in range(0, len(order), 4096):
        pool = sorted(order[start : start + 4096], key=lambda i: len(sequences[i]))
        batch: list[int] = []
        for i in pool:
            if (len(batch) + 1) * len(sequences[i]) > BATCH_TOKENS:
                ready.append(batch)
                batch = []
            batch.append(i)
        ready.append(batch)
    rng.shuffle(ready)
    for batch in ready:
        rows = [torch.tensor(sequences[i]) for i in batch]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def next_token_loss(model: Qwen2ForCausalLM, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of every token of [B, T] (padding -1) given those before it in its own dialogue.

    Under causal attention no token sees the padding to its right, so no attention mask is needed.
    """
    logits = model(input_ids=batch.clamp(min=0), use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1, reduction=reduction)


@torch.no_grad()
def perplexity(model: Qwen2ForCausalLM, sequences: Sequence[list[int]]) -> float:
    """exp of the mean cross-entropy over all tokens after the first of each dialogue."""
    total, count = 0.0, 0
    for batch in batches(sequences, random.Random(0)):
        total += next_token_loss(model, batch, reduction="sum").item()
        count += int((batch[:, 1:] >= 0).sum())
    return math.exp(total / count)


@torch.no_grad()
def residual_norms(model: Qwen2ForCausalLM, sequences: Sequence[list[int]]) -> list[dict[str, float]]:
    """Mean norm of the residual stream after each decoder block, at position 0 and at all others."""
    first: list[list[float]] = []
    rest: list[list[float]] = []
    for ids in sequences:
        norms = [state[0].norm(dim=-1) for state in _block_outputs(model, ids)]
        first.append([float(n[0]) for n in norms])
        rest.append([float(n[1:].mean()) for n in norms])
    means = zip(torch.tensor(first).mean(0).tolist(), torch.tensor(rest).mean(0).tolist(), strict=True)
    return [{"layer": i, "position_0": round(a, 2), "others": round(b, 2)} for i, (a, b) in enumerate(means)]


def _block_outputs(model: Qwen2ForCausalLM, ids: list[int]) -> list[torch.Tensor]:
    """Outputs [1, T, d] of the decoder blocks, before the final norm."""
    outputs: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        model.model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


@torch.no_grad()
def sample_answers(model: Any, tokenizer: Any, dialogues: Sequence[Dialogue], count: int = 6) -> list[dict[str, str]]:
    """Greedy answers to the first questions of `count` dialogues, beside what the documentation says."""
    samples = []
    for dialogue in dialogues[:count]:
        start = next(i for i, message in enumerate(dialogue) if message["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(dialogue[:start], tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=70, do_sample=False
        )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        question = dialogue[start - 1]["content"]
        samples.append({"question": question, "answer": answer, "documentation": dialogue[start]["content"]})
    return samples


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write training_report.json and the README that states what the model is and is not."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "training_report.json").write_text(text, encoding="utf-8")
    readme = README.format(
        millions=report["parameters"] / 1e6,
        minutes=report["seconds"] / 60,
        seen=report["tokens_seen"] / 1e6,
        **{name: report[name] for name in ("threads", "dialogues", "perplexity", "held_out")},
        **{name: report["versions"][name] for name in ("python", "torch", "numpy")},
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
