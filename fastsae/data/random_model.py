"""A language model that has learnt nothing: the control for what an SAE finds in any network of that shape."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fastsae.errors import UsageError


def with_random_weights(model: Any, seed: int) -> Any:
    """Returns a model of the same architecture, dtype and device whose weights are drawn anew, as transformers starts one.

    Args:
        model: A causal language model of transformers.
        seed: Determines the weights; random numbers elsewhere are drawn as if this had not been called.

    Raises:
        UsageError: The model is quantised, or lies on several devices.
    """
    if getattr(model, "hf_quantizer", None) is not None or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UsageError("random_model: expected a model on one device that is not quantised, got another")
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(config)
    return fresh.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
