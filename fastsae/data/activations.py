"""The residual stream of any causal language model: read it at one layer, or replace it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastsae.errors import FastsaeError, UsageError

_T = TypeVar("_T")
_NO_TOKENIZER = (
    "model {name!r} has no tokenizer that transformers can load: {reason}. Save the tokenizer beside the model with "
    "`tokenizer.save_pretrained(folder)`"
)


def load_model(
    name: str, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Load a frozen causal language model and its tokenizer: (model, tokenizer).

    Args:
        name: A local folder or a Hugging Face hub id.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or a torch.dtype. None keeps the dtype the weights are stored in.
        device: Where the model goes.

    Raises:
        UsageError: No such model, it is no causal language model, it has no tokenizer, or a bad dtype or device.
        FastsaeError: The hub cannot be reached, a download was interrupted, or a file is damaged.
    """
    target_dtype, target_device = _dtype(dtype), _device(device)
    path = Path(name).expanduser()
    is_local = path.exists() or name.startswith((".", "/", "~"))
    if is_local and not (path / "config.json").is_file():
        found = "a folder without config.json" if path.is_dir() else "no folder"
        raise UsageError(f"model {name!r}: expected a folder with config.json or a hub id, found {found}")
    location = str(path) if is_local else name
    try:
        import transformers
    except ImportError as error:
        raise FastsaeError(
            "this needs `transformers`, which is not installed: pip install 'fastsae-kernels[train]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # one for a second of reading a file; downloads keep theirs
    dtype_name = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    _loaded(name, "model", lambda: transformers.AutoConfig.from_pretrained(location))  # small: a bad name fails here
    tokenizer: Any = _loaded(name, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(location))
    if len(tokenizer.get_vocab()) <= max(len(tokenizer.added_tokens_decoder), len(tokenizer.all_special_ids)):
        # transformers 5 makes a tokenizer without words for some models when the tokenizer's files are missing.
        raise UsageError(_NO_TOKENIZER.format(name=name, reason="its vocabulary is empty"))
    options: dict[str, Any] = {dtype_name: target_dtype}
    options["output_loading_info"] = True
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = _loaded(name, "model", lambda: load(location, **options))
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise FastsaeError(
            f"model {name!r}: its files lack {len(info['missing_keys'])} of the weights ({missing}, ...), which would be "
            "random. Get its files again"
        )
    return model.to(target_device).eval().requires_grad_(False), tokenizer


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of decoder blocks: the outermost ModuleList with `num_hidden_layers` entries.

    Raises:
        FastsaeError: The model has none.
    """
    n_layers = _text_config(model).num_hidden_layers
    root: Any = model
    if hasattr(model, "get_decoder") and isinstance(model.get_decoder(), nn.Module):
        root = model.get_decoder()  # of a model with images or sound: the language part
    for scope in (root, model):
        lists = [
            (name.count("."), module)
            for name, module in scope.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == n_layers
        ]
        if lists:
            return min(lists, key=lambda entry: entry[0])[1]
    raise FastsaeError(f"{type(model).__name__}: expected a ModuleList of {n_layers} decoder blocks, found none")


def check_layer(model: Any, layer: int) -> None:
    """Raise UsageError unless `layer` is the number of one of the model's blocks, counted from 0."""
    n_layers = len(decoder_layers(model))
    if not 0 <= layer < n_layers:
        raise UsageError(f"layer: expected 0 to {n_layers - 1} (the model has {n_layers} layers), got {layer}")


class ResidualStream:
    """The residual stream after decoder block `layer`, counted from 0.

    This is `hidden_states[layer + 1]` of transformers, except after the last block, where transformers reports it
    behind the final norm and this class before it. Rows are padded on the right, so positions count from 0 in each.
    Nothing is differentiated.

    Attributes:
        d_in: Width of the residual stream.
        device: Device of the model's embedding, where inputs are moved to.

    Raises:
        UsageError: `layer` is out of range.
    """

    def __init__(self, model: Any, layer: int) -> None:
        check_layer(model, layer)
        self.model = model
        self.layer = layer
        self.block = decoder_layers(model)[layer]
        self.d_in: int = _text_config(model).hidden_size

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the activations [B, T, d_in], in the model's dtype; later blocks and the logits are not computed.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T], zero or False on padding. Activations there are meaningless.

        Raises:
            FastsaeError: An activation of a real token is NaN or infinite.
        """

        def stop(hidden: Tensor) -> Tensor:
            raise _Stop(hidden)

        acts: Tensor | None = None
        with _hooked(self.block, stop):
            try:
                self._forward(self.model.base_model, input_ids, attention_mask)
            except _Stop as reached:
                acts = reached.hidden
        if acts is None:
            raise FastsaeError(f"the forward pass of {type(self.model).__name__} did not reach layer {self.layer}")
        self._check_finite(acts, attention_mask)
        return acts

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the model's own logits [B, T, vocabulary]."""
        logits: Tensor = self._forward(self.model, input_ids, attention_mask).logits
        return logits

    @torch.no_grad()
    def splice(self, input_ids: Tensor, attention_mask: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits [B, T, vocabulary] with the block's output h [B, T, d_in] replaced by `replace(h)`.

        The result of `replace` is cast to the dtype of h.
        """
        with _hooked(self.block, lambda hidden: replace(hidden).to(hidden.dtype)):
            logits: Tensor = self._forward(self.model, input_ids, attention_mask).logits
        return logits

    def _forward(self, module: Any, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return module(
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask.to(self.device, torch.int64),
            use_cache=False,
            return_dict=True,
        )

    def _check_finite(self, acts: Tensor, attention_mask: Tensor) -> None:
        if torch.isfinite(acts).all():
            return
        bad = ~torch.isfinite(acts).all(dim=-1)[attention_mask.to(acts.device, torch.bool)]
        if bad.any():
            raise FastsaeError(
                f"layer {self.layer}: the activations of {100 * bad.float().mean().item():.3g} % of the tokens are "
                f"NaN or infinite, computed in {str(acts.dtype).removeprefix('torch.')}. Try --model-dtype float32 or "
                "bfloat16, which hold larger values than float16, or an earlier layer; if it stays, the weights are bad"
            )


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Carries the activations out of the forward pass and ends it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextmanager
def _hooked(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the block's hidden states by `change(hidden)`; blocks return them alone or first in a tuple."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _loaded(name: str, what: str, load: Callable[[], _T]) -> _T:
    """Run a loader of transformers, which reports most failures as OSError or ValueError with a long text."""
    try:
        return load()
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        lower = text.lower()
        if "couldn't connect" in lower or "offline" in lower or "connection" in lower:
            raise FastsaeError(
                f"model {name!r} is no local folder, and the Hugging Face hub could not be reached for its {what}. "
                "Give the path of a folder, or run again with a connection; what was downloaded so far is kept"
            ) from error
        if "not a valid model identifier" in lower or "gated repo" in lower or "repository not found" in lower:
            raise UsageError(
                f"model {name!r} is neither a local folder nor a model on the Hugging Face hub that you can read. "
                "Check the spelling; a private or gated model needs `hf auth login` first"
            ) from error
        if what == "tokenizer":
            raise UsageError(_NO_TOKENIZER.format(name=name, reason=text[:300])) from error
        if isinstance(error, ValueError) and ("unrecognized" in lower or "does not recognize" in lower):
            raise UsageError(
                f"model {name!r} is no causal language model that this version of transformers knows: {text[:300]}"
            ) from error
        raise FastsaeError(
            f"model {name!r} could not be loaded ({type(error).__name__}: {text[:300]}). If it was downloaded or "
            "copied, that may have been interrupted: get its files again, and check the free disk space"
        ) from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise UsageError(f"model dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    return resolved


def _device(device: str | torch.device) -> torch.device:
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: expected 'cpu', 'cuda' or 'cuda:0', got {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {str(device)!r}: PyTorch finds no CUDA device on this machine; use 'cpu'")
    return resolved


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
