"""The gradient that each token's own loss has: by its factors, a few numbers per entry and a few vectors per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import fastsae_kernels as kernels
from fastsae.sae.base import SparseAutoencoder
from fastsae.sae.jumprelu import Sparsity
from fastsae.sae.relu import FusedReLUSAE
from fastsae.sae.topk import TopKFamily
from fastsae_kernels import AutoencodeSpec, SparseActs
from fastsae_kernels.gates import gate_backward, penalty_slope


@dataclass(frozen=True)
class SparsityTerm:
    """The sparsity term of a loss, as `training_forward` of the SAE takes it; the TopK family has none.

    Args:
        coefficient: Its weight beside the squared error; 0 leaves the reconstruction alone.
        form: That of a JumpReLU SAE's; a ReLU SAE has `coefficient * sum feature_acts * |W_dec|`.
        target_l0: For `quadratic`.
        tanh_scale: For `tanh`.
    """

    coefficient: float = 0.0
    form: Sparsity = "step"
    target_l0: float | None = None
    tanh_scale: float = 4.0

    def spec(self, sae: SparseAutoencoder) -> AutoencodeSpec:
        """The options of an SAE's training pass, but for the choice of a batch's entries."""
        penalty = "l1" if isinstance(sae, FusedReLUSAE) else "tanh" if self.form == "tanh" else "l0"
        return AutoencodeSpec(
            bandwidth=getattr(sae, "bandwidth", 0.0),
            k=sae.k_per_token,
            penalty=penalty,  # type: ignore[arg-type]
            tanh_scale=self.tanh_scale,
            ste_to_input=getattr(sae, "ste_to_input", False),
        )

    def weight_of_tokens(self, sae: SparseAutoencoder, l0: Tensor) -> Tensor:
        """`[N]`, derivative of each token's loss with respect to its penalty, from its number of active features."""
        if isinstance(sae, TopKFamily):
            return torch.zeros_like(l0)
        if self.form == "quadratic" and not isinstance(sae, FusedReLUSAE):
            assert self.target_l0 is not None
            return self.coefficient * 4 / self.target_l0 * (l0 - self.target_l0)
        return torch.full_like(l0, self.coefficient)


class TokenGradients(NamedTuple):
    """Gradients of each token's loss, `|x - sae_out|^2` and the sparsity term, in float64.

    With n and j the token and the feature of an entry, the gradients of one token are

        W_dec[j]      acts * error[n] + along * W_dec[j] / |W_dec[j]|
        W_enc[:, j]   hidden_pre * x[n]
        b_enc[j]      hidden_pre
        threshold[j]  threshold            (of `log_threshold`, where the SAE trains that)
        b_dec         b_dec[n]

    and 0 where there is no entry. Entries lie by token, then by feature.
    """

    tokens: Tensor  # [nnz] int64
    features: Tensor  # [nnz] int64
    acts: Tensor  # [nnz]
    along: Tensor | None  # [nnz]; None where the sparsity term does not reach the decoder
    hidden_pre: Tensor  # [nnz]
    threshold: Tensor | None  # [nnz]; None where no threshold is trained
    x: Tensor  # [N, d_in], what the encoder reads
    error: Tensor  # [N, d_in], the gradient of the reconstruction
    b_dec: Tensor  # [N, d_in]


@torch.no_grad()
def token_gradients(sae: SparseAutoencoder, x: Tensor, term: SparsityTerm) -> TokenGradients:
    """The gradients of each token's loss, without a tensor of tokens x features.

    A mean over tokens, as training takes it, has the mean of these for its gradient. The losses for dead features are left
    out, and so is what an optimiser does to a gradient: it clips it, and removes the part along a decoder row.

    Args:
        sae: The SAE. A BatchTopK SAE chooses among the entries of this batch, and the choice has no gradient.
        x: `[N, d_in]`, finite activations.
        term: The sparsity term.

    Raises:
        ValueError: The width of x is not the SAE's, or a value is NaN or infinite.
        TypeError: `x` is not floating-point.

    Numerics:
        The pass runs in the SAE's dtype, in float32 at least behind the encoder.
    """
    spec, wide = term.spec(sae), sae._wide()
    checked = sae._checked(x)
    acts = _entries(sae, checked, spec)
    tokens, features = acts.row_ids(), acts.indices.long()
    W_dec, values = sae.W_dec.to(wide), acts.values.requires_grad_()
    with torch.enable_grad():
        residual = kernels.decode(replace(acts, values=values), W_dec.detach(), sae.b_dec.detach().to(wide)) - checked
        (grad_acts,) = torch.autograd.grad(residual.square().sum(), values)
    values, error = values.detach(), 2 * residual.detach()
    weight = term.weight_of_tokens(sae, acts.l0().to(wide))[tokens]
    along = None
    if spec.penalty != "l0" and term.coefficient:
        norms = sae.decoder_norms()[features]
        grad_scaled = weight * penalty_slope(values, norms, spec)
        along = grad_scaled * values
        grad_acts = grad_acts + grad_scaled * norms
    threshold = sae.gate_threshold().to(wide)[features]
    window = values - threshold < spec.bandwidth / 2  # inactive entries, of value 0, are listed for the window alone
    hidden_pre, grad_threshold = gate_backward(values > 0, window, threshold.clone(), grad_acts, weight, spec)
    if grad_threshold is not None and hasattr(sae, "log_threshold"):
        grad_threshold = grad_threshold * threshold
    grad_b_dec = error
    if sae.apply_b_dec_to_input:
        grad_b_dec = error - kernels.decode(replace(acts, values=hidden_pre), sae.W_enc.t().to(wide))
    return TokenGradients(
        tokens,
        features,
        values.double(),
        None if along is None else along.double(),
        hidden_pre.double(),
        None if grad_threshold is None else grad_threshold.double(),
        sae._sae_in(checked).double(),
        error.double(),
        grad_b_dec.double(),
    )


def _entries(sae: SparseAutoencoder, x: Tensor, spec: AutoencodeSpec) -> SparseActs:
    """The entries of a training pass, packed, those of the window with value 0; values as `W_dec` itself decodes them."""
    if not isinstance(sae, TopKFamily):
        gates = sae.gate_threshold()
        return kernels.encode(sae._sae_in(x), sae.W_enc, sae.b_enc, gates, bandwidth=spec.bandwidth, k=spec.k).packed()
    acts, scale = sae._encode_training(x).packed(), sae._rescaling()
    return acts if scale is None else acts.divided(scale)
