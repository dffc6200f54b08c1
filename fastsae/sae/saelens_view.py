"""What SAELens' tools ask an SAE beyond its weights: `cfg` with its metadata, and an activation function to look at."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, ValuesView
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from fastsae.sae.storage import StoredModule


class MetadataView:
    """`sae.metadata` as SAELens' metadata object: attributes or keys, None for what is not there.

    Args:
        values: `sae.metadata` itself; what is written here is written there.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ = values

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # what copy, pickle and others look for in any object
            raise AttributeError(name)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MetadataView) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MetadataView({self.__dict__})"

    def get(self, name: str, default: Any = None) -> Any:
        """The value, `default` where it is not there."""
        return self.__dict__.get(name, default)

    def keys(self) -> KeysView[str]:
        """The names that are there."""
        return self.__dict__.keys()

    def values(self) -> ValuesView[Any]:
        """Their values."""
        return self.__dict__.values()

    def items(self) -> ItemsView[str, Any]:
        """Both."""
        return self.__dict__.items()

    def to_dict(self) -> dict[str, Any]:
        """A copy as a dictionary."""
        return dict(self.__dict__)


class ConfigView:
    """An SAE's options under the names of SAELens' config; always those that the SAE has now.

    `d_in`, `d_sae`, `dtype` and `device` (texts), `apply_b_dec_to_input`, `normalize_activations`, `reshape_activations`,
    and what SAELens' config of this architecture has beside them, as far as this library has it: `k`,
    `rescale_acts_by_decoder_norm`, `topk_threshold_lr`, `jumprelu_bandwidth`, `jumprelu_init_threshold`,
    `jumprelu_ste_to_input`. These are read-only: another value raises, the same one does nothing.

    Every other name is one of `metadata`, where SAELens kept them at the top before version 6: tools such as SAEBench
    still read `cfg.hook_name`, and write notes of their own there.

    Args:
        sae: Whose options these are.
    """

    def __init__(self, sae: StoredModule) -> None:
        object.__setattr__(self, "_sae", sae)

    def architecture(self) -> str:
        """SAELens' word, such as `jumprelu`."""
        return self._sae.architecture

    @property
    def metadata(self) -> MetadataView:
        """What is known of the place of the SAE in its model; `sae.metadata` by another name."""
        return MetadataView(self._sae.metadata)

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as SAELens' `cfg.to_dict()` returns them."""
        metadata = dict(self._sae.metadata)
        return {**self._options(), "metadata": metadata, "architecture": self.architecture()}

    def _options(self) -> dict[str, Any]:
        sae = self._sae
        return {
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "dtype": str(sae.dtype).removeprefix("torch."),
            "device": str(sae.device),
            "apply_b_dec_to_input": sae.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **sae.saelens_options(),
        }

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for values in (self._options(), self._sae.metadata):
                if name in values:
                    return values[name]
        raise AttributeError(f"cfg has no {name!r}; it holds what SAELens' config of this architecture does")

    def __setattr__(self, name: str, value: Any) -> None:
        fixed = {**self._options(), "metadata": self.metadata, "architecture": None}
        if name not in fixed and not name.startswith("_"):
            self._sae.metadata[name] = value
        elif name not in fixed or fixed[name] != value:
            raise AttributeError(f"cfg.{name}: it says what the SAE is; change the SAE itself (sae.to, its attributes)")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._options(), *self._sae.metadata]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigView) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ConfigView({self.to_dict()})"


def activation_fn(k: int | None) -> nn.Module:
    """SAELens' `TopK` for a number of features per token, by which its tools know such SAEs; else a ReLU.

    Raises:
        AttributeError: There is a `k`, and SAELens is not installed.
    """
    if k is None:
        return nn.ReLU()
    try:
        activation: nn.Module = import_module("sae_lens.saes.topk_sae").TopK(k)
    except ImportError as error:
        raise AttributeError("activation_fn: expected SAELens to be installed, whose class it is") from error
    return activation
