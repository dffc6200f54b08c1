"""Loading the language model and its tokenizer: a folder, a GGUF file or a hub id, and one clear message for what fails."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastsae.data.model_dtype import choose_dtype, count_weights, empty_model, stored_dtype
from fastsae.disk import local_path
from fastsae.errors import FastsaeError, UsageError
from fastsae.fields import DTYPES

_T = TypeVar("_T")
_OPTIONS_OF_FILES = frozenset(("revision", "subfolder", "token", "cache_dir", "local_files_only"))
_OWN_OPTIONS = frozenset(("dtype", "torch_dtype", "config", "gguf_file", "output_loading_info", "trust_remote_code"))
_LARGE = 2**31  # bytes of weights from which loading takes seconds, so that it gets a line and a progress bar
_NO_TOKENIZER = (
    "model {name!r} has no tokenizer that transformers can load: {reason}. Save the tokenizer beside the model with "
    "`tokenizer.save_pretrained(folder)`"
)

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    options: dict[str, Any] | None = None,
    progress: bool = False,
) -> tuple[Any, Any]:
    """Load a frozen causal language model and its tokenizer: (model, tokenizer).

    Code that comes with a model is never run; transformers must know the model's type.

    Args:
        name: A local folder, a `.gguf` file or a Hugging Face hub id.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or a torch.dtype. None keeps the dtype the weights are stored in, or
            takes float32 on a CPU that is faster in it, see `fastsae.data.model_dtype.choose_dtype`.
        device: Where the model goes, unless `options` place it.
        options: More arguments of transformers' `from_pretrained`, such as `revision`, `device_map`, `attn_implementation` or
            `quantization_config`. Those that say where files are also hold for configuration and tokenizer.
        progress: Show transformers' progress bar for a model that takes seconds to load.

    Raises:
        UsageError: No such model, it is no causal language model, it has no tokenizer, or a bad dtype, device or option.
        FastsaeError: The hub cannot be reached, a download was interrupted, or a file or a package is missing or damaged.
    """
    target_dtype, target_device = _dtype(dtype), _device(device)
    source, config = _configured(name, options)
    import transformers

    auto: Any = transformers
    tokenizer: Any = source.load("tokenizer", auto.AutoTokenizer.from_pretrained, config=config)
    if len(tokenizer.get_vocab()) <= max(len(tokenizer.added_tokens_decoder), len(tokenizer.all_special_ids)):
        # transformers 5 makes a tokenizer without words for some models when the tokenizer's files are missing.
        raise UsageError(_NO_TOKENIZER.format(name=name, reason="its vocabulary is empty"))
    n_weights = count_weights(config)
    if target_dtype is None:
        target_dtype = _dtype_of(source, config, n_weights, target_device)
    if source.is_gguf or n_weights * 4 > _LARGE:
        logger.info("loading the language model")
        if progress:
            transformers.utils.logging.enable_progress_bar()
    model = _load_weights(source, config, target_dtype, progress)
    if target_dtype is None:  # only the weights themselves told their dtype
        target_dtype = choose_dtype(config, model.dtype, n_weights, target_device)
        if target_dtype not in (None, model.dtype):
            model = _load_weights(source, config, target_dtype, progress)
    if not source.places_weights:
        model = model.to(target_device)
    return model.eval().requires_grad_(False), tokenizer


def load_without_weights(
    name: str,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    options: dict[str, Any] | None = None,
) -> Any:
    """The model as `load_model` gives it, but on PyTorch's device `meta`: its sizes, from its configuration alone.

    Args:
        name: As for `load_model`, and so are the next three.
        dtype: Where nothing else tells it, float32 is taken.
        device: Where the model would go; a GPU need not be there.
        options: More arguments of `from_pretrained`.

    Raises:
        UsageError: No such model, it is no causal language model, or a bad dtype or option.
        FastsaeError: The hub cannot be reached, or a file or a package is missing or damaged.
    """
    target_dtype = _dtype(dtype)
    source, config = _configured(name, options)
    model = _loaded(name, "model", lambda: empty_model(config))
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    target_dtype = target_dtype or _dtype_of(source, config, n_weights, torch.device(device)) or torch.float32
    return model.to(target_dtype).eval().requires_grad_(False)


def _configured(name: str, options: dict[str, Any] | None) -> tuple[_Source, Any]:
    """Where a model is, and its configuration, which says that it is a causal language model."""
    source = _find(name).with_options(options or {})
    try:
        import transformers
    except ImportError as error:
        raise FastsaeError(
            "this needs `transformers`, which is not installed: pip install fastsae-kernels[train]"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # reading files is quick; downloads keep their bars
    auto: Any = transformers
    config = source.load("model", auto.AutoConfig.from_pretrained)  # small: a bad name fails here
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"model {name!r}: expected a causal language model, which is a decoder alone, got one of type "
            f"{config.model_type!r}, which has an encoder and a decoder"
        )
    return source, config


def _dtype_of(source: _Source, config: Any, n_weights: int, device: torch.device) -> torch.dtype | None:
    """The dtype of a model for which nobody names one; None where only its weights tell."""
    if source.is_gguf:
        return torch.float32  # the numbers of a GGUF file are unpacked, which other dtypes would round
    return choose_dtype(config, stored_dtype(config), n_weights, device)


@dataclass(frozen=True)
class _Source:
    """Where a model is, in the terms of transformers' `from_pretrained`."""

    name: str
    location: str
    options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, given: dict[str, Any]) -> _Source:
        """The same with the user's own arguments of `from_pretrained`."""
        if refused := sorted(_OWN_OPTIONS & given.keys()):
            raise UsageError(f"model_kwargs: expected options that fastsae has no flag for, got {refused[0]!r}")
        of_all = {name: value for name, value in given.items() if name in _OPTIONS_OF_FILES}
        of_model = {name: value for name, value in given.items() if name not in _OPTIONS_OF_FILES}
        return _Source(self.name, self.location, {**self.options, **of_all}, of_model)

    @property
    def places_weights(self) -> bool:
        """Whether transformers puts the weights where they belong, from where they cannot be moved."""
        return not self.model_options.keys().isdisjoint(("device_map", "quantization_config"))

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.options

    def load(self, what: str, from_pretrained: Callable[..., _T], **options: Any) -> _T:
        # trust_remote_code: without an answer, transformers asks on the terminal.
        options = {**options, **self.options, "trust_remote_code": False}
        try:
            return _loaded(self.name, what, lambda: from_pretrained(self.location, **options))
        except FastsaeError as error:
            if not self.model_options or what != "model" or isinstance(error, UsageError):
                raise
            given = ", ".join(self.model_options)
            raise FastsaeError(
                f"{error}. It was loaded with --model-kwargs {given}, which may be the reason"
            ) from error


def _find(name: str) -> _Source:
    path = local_path(name)
    if path.suffix.lower() == ".gguf" or path.is_file():
        return _find_gguf(name, path)
    is_local = path.exists() or name.startswith((".", "/", "~"))
    if is_local and not (path / "config.json").is_file():
        found = "a folder without config.json" if path.is_dir() else "no folder"
        raise UsageError(f"model {name!r}: expected a folder with config.json, a .gguf file or a hub id, found {found}")
    return _Source(name, str(path) if is_local else name)


def _find_gguf(name: str, path: Path) -> _Source:
    if not path.is_file():
        raise UsageError(f"model {name!r}: there is no such file ({path.absolute()})")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(
                f"model {name!r}: expected a GGUF file or a folder with config.json, found a file that is not GGUF"
            )
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise FastsaeError(
            f"model {name!r}: reading a GGUF file needs {' and '.join(missing)}: pip install fastsae-kernels[gguf]"
        )
    return _Source(name, str(path.parent), {"gguf_file": path.name})


def _load_weights(source: _Source, config: Any, dtype: torch.dtype | None, progress: bool) -> Any:
    import transformers

    auto: Any = transformers
    dtype_option = "dtype" if _version(auto.__version__) >= (4, 56) else "torch_dtype"
    options = {**source.model_options, dtype_option: "auto" if dtype is None else dtype, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are then listed, and refused below
    if source.is_gguf:
        options["config"] = config  # reading it again would take seconds
    # transformers shows a bar while it unpacks a GGUF file, whatever it is told
    with contextlib.redirect_stderr(io.StringIO()) if source.is_gguf and not progress else contextlib.nullcontext():
        model, info = source.load("model", auto.AutoModelForCausalLM.from_pretrained, **options)
    if wrong := sorted(info["mismatched_keys"]):
        key, found, expected = wrong[0]
        raise FastsaeError(
            f"model {source.name!r}: expected weights of the sizes that its config.json names, such as {key} "
            f"{list(expected)}, got {list(found)} ({len(wrong)} of its weights have another size). Its config.json and "
            "its weights do not belong together: get both again"
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise FastsaeError(
            f"model {source.name!r}: its files lack {len(info['missing_keys'])} of the weights ({missing}, ...), which "
            "would be random. Get its files again"
        )
    return model


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
        if isinstance(error, ImportError):
            raise FastsaeError(f"model {name!r} needs a package that is not installed: {text[:300]}") from error
        if "trust_remote_code" in lower:
            raise UsageError(
                f"model {name!r} needs Python code that comes with its {what}, which fastsae does not run. Upgrade "
                "transformers, which may know this type of model by now, or choose a model that transformers knows"
            ) from error
        if what == "tokenizer":
            raise UsageError(_NO_TOKENIZER.format(name=name, reason=text[:300])) from error
        unknown = ("unrecognized", "does not recognize", "is not supported yet")
        if isinstance(error, ValueError) and any(words in lower for words in unknown):
            raise UsageError(
                f"model {name!r} is no causal language model that this version of transformers knows: {text[:300]}"
            ) from error
        raise FastsaeError(
            f"model {name!r} could not be loaded ({type(error).__name__}: {text[:300]}). If it was downloaded or "
            "copied, that may have been interrupted: get its files again, and check the free disk space"
        ) from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is None or resolved in DTYPES.values():
        return resolved
    raise UsageError(f"model dtype: expected float32, bfloat16 or float16, got {dtype!r}")


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
