"""The half of an SAE that others see: files, the hub, and the members that SAELens' tools ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastsae.disk import local_path
from fastsae.sae import files, hub
from fastsae.sae.config_file import SavedConfig
from fastsae.sae.saelens_view import ConfigView, activation_fn

Module = TypeVar("Module", bound="StoredModule")


class StoredModule(nn.Module, ABC):
    """A module that is saved in SAELens' files and known to SAELens' tools by `cfg`."""

    architecture: ClassVar[str]  # SAELens' word
    file_architectures: ClassVar[tuple[str, ...]]  # what cfg.json may call it
    hook_z_reshaping_mode: ClassVar[bool] = False
    d_in: int
    d_sae: int
    k: int | None
    apply_b_dec_to_input: bool
    decoder_init_norm: float
    metadata: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        files.classes += [cls] if "file_architectures" in cls.__dict__ else []

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the weights."""

    @property
    @abstractmethod
    def k_per_token(self) -> int | None:
        """At most this many features of a token are active at inference; None where each feature's gate decides alone."""

    @property
    def cfg(self) -> ConfigView:
        """The options as SAELens' tools read them; a view, read-only but for the metadata."""
        return ConfigView(self)

    @property
    def activation_fn(self) -> nn.Module:
        """What SAELens' tools look at to tell TopK SAEs from others; no pass of this library uses it.

        Raises:
            AttributeError: This is a TopK SAE, and SAELens is not installed.
        """
        return activation_fn(self.k_per_token)

    def saelens_options(self) -> dict[str, Any]:
        """Options by the names that SAELens' config of this architecture has beside those of every architecture."""
        return {}

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Does nothing: these classes never reshape. SAELens' evaluations call it."""

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Does nothing, too: activations with their heads apart, `[..., n_heads, d_head]`, stay an error of their shape.

        SAELens' tools call it to restore a mode that they have turned off, and so never where it was off, as it is here.

        Raises:
            ValueError: The SAE's hook is known and is none of attention heads; the same as in SAELens.
        """
        hook = self.metadata.get("hook_name")
        if hook is not None and not str(hook).endswith("_z"):
            raise ValueError(f"hook_z reshaping: expected an SAE of attention heads, got one of {hook}")

    def config(self) -> dict[str, Any]:
        """Options beyond the sizes, as saved beside the weights."""
        return {"k": self.k}

    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What SAELens wants to find: keys of `cfg.json` beyond those of every architecture, and the tensors."""
        return {"architecture": self.architecture}, self.state_dict()

    @classmethod
    def arguments_from(cls, config: SavedConfig) -> dict[str, Any]:
        """Constructor arguments of this class from a `cfg.json`, beyond those that every architecture has.

        Raises:
            ValueError: A key is missing, or its value is not what it can be.
        """
        config.own.check_names(["architecture", "k"])
        return {"k": config.own.integer("k", 1, config.d_sae, default=None)}

    @classmethod
    def file_shapes(cls, config: SavedConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors in the weights' file."""
        shape = (config.d_in, config.d_sae)
        return {"W_enc": shape, "b_enc": shape[1:], "W_dec": shape[::-1], "b_dec": shape[:1]}

    @classmethod
    def state_from(cls, config: SavedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict, from the tensors of the weights' file.

        Raises:
            ValueError: A tensor does not hold what it can.
        """
        return tensors

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Writes SAELens' `cfg.json` and `sae_weights.safetensors` to the folder `path`, each file atomically.

        Args:
            path: Folder; made where it does not exist.
            metadata: Merged into the metadata of `cfg.json` (`model_name`, `hook_name`, ...).

        Raises:
            ValueError: A weight is NaN or infinite, or the metadata is no JSON; nothing was written.
            OSError: The disk is full, or the folder cannot be written.
        """
        files.save(self, local_path(path), {**self.metadata, **metadata})

    @classmethod
    def load(
        cls: type[Module],
        path: str | Path,
        device: torch.device | str | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> Module:
        """Reads an SAE from SAELens' two files, or from another library's; on the base class any known architecture.

        `docs/formats.md` lists the formats, which are recognised by their files; `metadata["provenance"]` then says which one it
        was and what was folded. Nothing is allocated beyond what SAELens' files hold, and no random numbers are drawn.

        Args:
            path: A folder, or, as a text, a repository of the Hugging Face hub, such as `owner/name`; a folder of that name
                comes first.
            device: Where the weights go.
            subfolder: Where in the folder or the repository the files are.
            revision: Branch, tag or commit of the repository.

        Raises:
            FileNotFoundError: A file is missing, or there is neither such a folder nor such a repository.
            ValueError: A file is corrupt, or holds what this class does not run; it names the key or the tensor.
            FastsaeError: The hub could not be reached, or huggingface_hub is not installed.
        """
        sae = files.load(hub.located(path, subfolder, revision), device, cls)
        if not isinstance(sae, cls):
            raise ValueError(f"{path}: expected an SAE that {cls.__name__} runs, got architecture {sae.architecture!r}")
        return sae

    @classmethod
    def from_saelens(cls: type[Module], sae: Any) -> Module:
        """A copy of an SAE of SAELens, of an inference or of a training class, on its device.

        What SAELens gives its trainer by the config, such as coefficients and the form of the sparsity loss, are here
        arguments of `training_forward`.

        Raises:
            TypeError: `sae` is none of SAELens.
            ValueError: This class does not run its architecture or an option of it; the message names it.
        """
        copy = files.from_saelens(sae, cls)
        if not isinstance(copy, cls):
            raise ValueError(f"sae: expected an SAE that {cls.__name__} runs, got architecture {copy.architecture!r}")
        return copy

    def push_to_hub(
        self,
        repo_id: str,
        subfolder: str | None = None,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload an SAE",
        log_sparsity: Tensor | None = None,
    ) -> str:
        """Uploads both files, and a model card where the repository has none, in one commit; returns its address.

        `load(repo_id, subfolder=subfolder)` reads them again, and SAELens' `SAE.from_pretrained(repo_id, subfolder)`, which
        wants a subfolder.

        Args:
            repo_id: `owner/name`; made where it does not exist.
            subfolder: Where in the repository; its top, where None.
            private: Whether a new repository is; None is the account's default.
            token: Of the hub; None takes the one of `hf auth login`.
            commit_message: Of the commit.
            log_sparsity: `[d_sae]`, log10 of the share of tokens on which each feature fires, uploaded as SAELens'
                `sparsity.safetensors`; a folder of `fastsae train` has it in a file of that name.

        Raises:
            ValueError: A weight is NaN or infinite, `log_sparsity` is no number for each feature, or the metadata is no
                JSON; nothing was uploaded.
            FastsaeError: The hub refused or could not be reached, or huggingface_hub is not installed.
        """
        return hub.push(
            self, repo_id, subfolder, private=private, token=token, message=commit_message, log_sparsity=log_sparsity
        )
