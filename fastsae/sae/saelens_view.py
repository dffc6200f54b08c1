"""What SAELens' tools ask an SAE beyond its weights: `cfg` and its metadata, as read-only views."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, ValuesView
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsae.sae.storage import StoredModule


class MetadataView:
    """`sae.metadata` as SAELens' metadata object: attributes or keys, None for what is not there. Read-only.

    Args:
        values: What is known of the place of the SAE in its model.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # what copy, pickle and others look for in any object
            raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self or self[name] != value:
            raise _read_only(f"metadata.{name}", f"set sae.metadata[{name!r}] instead")

    def __getitem__(self, name: str) -> Any:
        return self.__dict__.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

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
    """An SAE's options under the names of SAELens' config; always those that the SAE has now. Read-only.

    `d_in`, `d_sae`, `dtype` and `device` (texts), `apply_b_dec_to_input`, `normalize_activations`, `reshape_activations`,
    `metadata`, and what SAELens' config of this architecture has beside them, as far as this library has it: `k`,
    `rescale_acts_by_decoder_norm`, `topk_threshold_lr`, `jumprelu_bandwidth`, `jumprelu_init_threshold`,
    `jumprelu_ste_to_input`. Writing what is there already changes nothing and raises nothing: evaluations do so with
    `dtype` after `sae.to`.

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
        """What is known of the place of the SAE in its model."""
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
            options = self._options()
            if name in options:
                return options[name]
        raise AttributeError(f"cfg has no {name!r}; it holds what SAELens' config of this architecture does")

    def __setattr__(self, name: str, value: Any) -> None:
        options = self._options()
        if name not in options or options[name] != value:
            raise _read_only(name, "change the SAE itself (sae.to, its attributes)")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._options()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigView) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ConfigView({self.to_dict()})"


def _read_only(name: str, advice: str) -> AttributeError:
    return AttributeError(f"cfg.{name}: cfg is a read-only view of the SAE; {advice}")
