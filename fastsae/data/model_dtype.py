"""The dtype in which this machine runs a language model fastest, of those that hold every stored weight."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from fastsae.data.activations import text_config
from fastsae.machine import free_memory

_HALF = (torch.bfloat16, torch.float16)  # float32 holds every number of both
_CLEARLY_FASTER = 1.2  # below this factor the noise of the measurement could decide, so float32 stays
_PRODUCT = 2.5e8  # multiplications and additions of the measured product, each counted
_SECONDS = 0.25  # in which the measurement goes on

logger = logging.getLogger(__name__)


def choose_dtype(config: Any, stored: torch.dtype | None, n_weights: int, device: torch.device) -> torch.dtype | None:
    """Returns the dtype to load a model in, and says in one log line why where it is not the only choice.

    Weights stored in bfloat16 or float16 keep that dtype on a CPU only if a product of the model's shapes is clearly faster
    in it than in float32, which holds all their numbers, or if float32 would not fit in memory. All others keep theirs.

    Args:
        config: Configuration of the model.
        stored: Dtype of its weights, None where that is not known.
        n_weights: Number of its weights; 0 where that is not known.
        device: Where the model will run.
    """
    if stored not in _HALF or device.type != "cpu" or getattr(config, "quantization_config", None) is not None:
        return stored
    free = free_memory(device)
    if free is not None and n_weights * 4 > free / 2:
        logger.info(
            "the language model runs in %s, as stored: in float32 its weights would take %.1f GB of the %.1f GB of free memory",
            dtype_name(stored),
            n_weights * 4 / 1e9,
            free / 1e9,
        )
        return stored
    wide, narrow = measure_products(config, stored)
    chosen = stored if narrow >= _CLEARLY_FASTER * wide else torch.float32
    logger.info(
        "the language model runs in %s: it is stored in %s, and a core computes %.0f GFLOP/s in float32 and %.0f in %s",
        dtype_name(chosen),
        dtype_name(stored),
        wide,
        narrow,
        dtype_name(stored),
    )
    return chosen


def measure_products(config: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the rates at which one core forms a product of the model's shapes, in GFLOP/s: in float32, and in `dtype`.

    Both are measured in turn and the fastest repetition counts, on one core, which other work on the machine disturbs least.
    """
    sizes = text_config(config)
    d_in = min(1024, _size(sizes, "hidden_size", 768))
    d_out = min(2048, _size(sizes, "intermediate_size", 4 * d_in))
    n_tokens = int(min(4096, max(64, _PRODUCT / (2 * d_in * d_out))))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _fastest((torch.float32, dtype), n_tokens, d_in, d_out)
    finally:
        torch.set_num_threads(n_threads)
    operations = 2 * n_tokens * d_in * d_out
    return operations / seconds[torch.float32] / 1e9, operations / seconds[dtype] / 1e9


@torch.inference_mode()
def _fastest(kinds: tuple[torch.dtype, ...], n: int, d_in: int, d_out: int) -> dict[torch.dtype, float]:
    """The seconds of each dtype's fastest product of `[n, d_in]` and `[d_in, d_out]`, of all that fit in `_SECONDS`."""
    factors = {kind: (torch.ones(n, d_in, dtype=kind), torch.ones(d_out, d_in, dtype=kind)) for kind in kinds}
    for x, weight in factors.values():
        torch.nn.functional.linear(x[:64], weight)  # the first product of a dtype sets things up
    seconds = dict.fromkeys(kinds, float("inf"))
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or float("inf") in seconds.values():
        for kind, (x, weight) in factors.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[kind] = min(seconds[kind], time.perf_counter() - start)
    return seconds


def _size(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]  # one for each layer
    return value if isinstance(value, int) and value > 0 else default


def stored_dtype(config: Any) -> torch.dtype | None:
    """Returns the dtype that a model's configuration names for its weights, if it names one."""
    for part in (config, text_config(config)):
        values = vars(part)
        found = values.get("dtype", values.get("torch_dtype"))
        if isinstance(found, str):
            found = getattr(torch, found.removeprefix("torch."), None)
        if isinstance(found, torch.dtype):
            return found
    return None


def empty_model(config: Any) -> Any:
    """Returns a causal language model on PyTorch's device `meta`, where weights have sizes and no numbers."""
    import transformers

    auto: Any = transformers
    with torch.device("meta"):
        return auto.AutoModelForCausalLM.from_config(config)


def count_weights(config: Any) -> int:
    """Returns the number of weights of a model, without making them; 0 where transformers cannot tell."""
    try:
        return sum(parameter.numel() for parameter in empty_model(config).parameters())
    except Exception:
        return 0  # loading it will say what is wrong


def dtype_name(dtype: Any) -> str:
    """Returns `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
