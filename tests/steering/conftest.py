"""The model that most tests steer, its tokenizer, an SAE for it, and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from steered_model import D_IN, PROMPTS, hooks_of, render

from fastsae import FusedJumpReLUSAE, SparseAutoencoder


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.generation_config.eos_token_id = None  # no row ends by itself
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(4)  # so that tokens heed each other, and a token edited by mistake shows
    return model


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    """The model, whose hooks and methods are its own again when the test is over."""
    yield loaded
    assert not any(hooks_of(loaded))
    assert "generate" not in loaded.__dict__


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def sae() -> SparseAutoencoder:
    sae = FusedJumpReLUSAE(D_IN, 64, init_threshold=0.01)
    sae.metadata = {"hook_name": "blocks.0.hook_resid_post"}
    with torch.no_grad():
        sae.b_dec.normal_(std=0.1)
        sae.W_enc.mul_(3)
    return sae


@pytest.fixture
def prompts(tokenizer: Any) -> list[list[int]]:
    return [render(tokenizer, messages) for messages in PROMPTS]
