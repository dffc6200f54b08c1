"""The shared base of the sparse autoencoders: parameters, initialisation, the ops that run them, load and save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

import fastsae_kernels as kernels
from fastsae.sae import files
from fastsae.sae.outputs import TrainOutput
from fastsae_kernels import ActivityHint, AutoencodeOutput, AutoencodeSpec, SparseActs, reference

Module = TypeVar("Module", bound="SparseAutoencoder")


class SparseAutoencoder(nn.Module, ABC):
    """Encoder, gate and decoder with SAELens' parameter names; a subclass says what the gate and the penalty are.

    `W_enc` is stored feature-major (`[d_sae, d_in]` in memory, viewed `[d_in, d_sae]`), which every kernel wants.
    """

    architecture: ClassVar[str]  # SAELens' word, written to cfg.json

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        apply_b_dec_to_input: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in, d_sae: expected integers >= 1, got {d_in} and {d_sae}")
        if k is not None and not 1 <= k <= d_sae:
            raise ValueError(f"k: expected None or 1 <= k <= d_sae = {d_sae}, got {k}")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.metadata: dict[str, Any] = {}
        self._activity = ActivityHint()
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, **factory).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **factory))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in, **factory))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws `W_dec` Kaiming-uniform with unit-norm rows, sets `W_enc` to its transpose and the biases to 0."""
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.W_dec, a=5**0.5)
            self.normalize_decoder_()
            self.W_enc.copy_(self.W_dec.t())
            self.b_enc.zero_()
            self.b_dec.zero_()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; `threshold` is float32 whatever it is."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_enc.device

    @abstractmethod
    def gate_threshold(self) -> Tensor:
        """`[d_sae]` float32, >= 0: a feature is active strictly above it."""

    def _spec(self, penalty: Any = "l0") -> AutoencodeSpec:
        return AutoencodeSpec(k=self.k, penalty=penalty)

    def _sae_in(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"x: expected last dimension d_in = {self.d_in}, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
        x = x.to(self.dtype)
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def _autoencode(self, x: Tensor, penalty: Any = "l0", feature_scale: Tensor | None = None) -> AutoencodeOutput:
        return kernels.autoencode(
            self._sae_in(x),
            self.W_enc,
            self.b_enc,
            self.gate_threshold(),
            self.W_dec,
            self.b_dec,
            spec=self._spec(penalty),
            feature_scale=feature_scale,
            hint=self._activity,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructs `x`, `[..., d_in]`; differentiable, and never allocates `[N, d_sae]`.

        Raises:
            ValueError: The last dimension of `x` is not `d_in`.
            TypeError: `x` is not floating-point.
        """
        return self._autoencode(x).sae_out

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations as a dense tensor, `[..., d_sae]`; differentiable. Allocates what it returns."""

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """The active features of each token, without a dense tensor; leading dimensions are flattened.

        Differentiable in `.values`, but for the threshold, whose estimate needs inactive entries too.
        """
        x = self._sae_in(x).reshape(-1, self.d_in)
        return kernels.encode(x, self.W_enc, self.b_enc, self.gate_threshold(), k=self.k)

    def decode(self, acts: Tensor | SparseActs) -> Tensor:
        """The reconstruction from dense `[..., d_sae]` or sparse activations, `[..., d_in]` or `[N, d_in]`."""
        if isinstance(acts, SparseActs):
            return kernels.decode(acts, self.W_dec, self.b_dec)
        if acts.dim() == 0 or acts.shape[-1] != self.d_sae:
            raise ValueError(f"acts: expected last dimension d_sae = {self.d_sae}, got shape {tuple(acts.shape)}")
        return reference.decode(acts.to(self.dtype), self.W_dec, self.b_dec)

    def _train_output(
        self, x: Tensor, output: AutoencodeOutput, sparsity_loss: Tensor, losses: dict[str, Tensor], name: str
    ) -> TrainOutput:
        error = (output.sae_out - x.to(self.dtype)).float()
        per_token = error.square().sum(-1)
        losses = {"mse_loss": per_token.mean(), name: sparsity_loss, **losses}
        with torch.no_grad():
            flat = x.reshape(-1, self.d_in).float()
            variance = (flat - flat.mean(0)).square().sum()
            fvu = per_token.sum() / variance.clamp_min(torch.finfo(torch.float32).tiny)
        return TrainOutput(
            sae_out=output.sae_out,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            l0=output.l0.float().mean(),
            fvu=fvu,
            feature_counts=output.feature_counts,
            sparse_acts=output.acts,
            encode_again=self._encode_again(x),
        )

    def _encode_again(self, x: Tensor) -> Callable[[], SparseActs]:
        version = self.W_enc._version

        def encode() -> SparseActs:
            if self.W_enc._version != version:
                raise RuntimeError(
                    "acts: the weights have changed since this pass; read `acts` before the optimiser's step"
                )
            with torch.no_grad():
                return self.encode_sparse(x.detach())

        return encode

    def decoder_norms(self) -> Tensor:
        """`[d_sae]` fp32, differentiable: length of each feature's direction."""
        return self.W_dec.float().norm(dim=1)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Gives each row of `W_dec` unit norm, in place; activations are not compensated."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def fold_activation_scale_(self, scale: float) -> None:
        """Rewrites an SAE trained on `scale * x` as the equal one on `x`: everything in activation units is divided by `scale`.

        sae'(x) = sae(scale * x) / scale        W unchanged; b_enc, b_dec, threshold, bandwidth /= scale
        """
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    def config(self) -> dict[str, Any]:
        """Constructor arguments beyond the sizes, as saved beside the weights."""
        return {"k": self.k}

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Writes SAELens' `cfg.json` and `sae_weights.safetensors` to the folder `path`, each file atomically.

        Args:
            path: Folder; made where it does not exist.
            metadata: Merged into the metadata of `cfg.json` (`model_name`, `hook_name`, ...).
        """
        files.save(self, Path(path), {**self.metadata, **metadata})

    @classmethod
    def load(cls: type[Module], path: str | Path, device: torch.device | str | None = None) -> Module:
        """Reads an SAE from SAELens' two files; on the base class any known architecture, else the class's own.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is corrupt, or holds another architecture, shape or option than this class runs.
        """
        sae = files.load(Path(path), device)
        if not isinstance(sae, cls):
            raise ValueError(f"{path}: expected an SAE that {cls.__name__} runs, got architecture {sae.architecture!r}")
        return sae
