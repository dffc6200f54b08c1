"""The TopK family: every pass against dense autograd in fp64, the auxiliary loss, wrong input."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_helpers import DEVICE, FEW_PROGRAMS, needs_kernels
from topk_problem import CLASSES, D_IN, D_SAE, dense_pass, randomised

import fastsae_kernels as kernels
from fastsae import FusedBatchTopKSAE, FusedTopKSAE


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("k", [1, 4, D_SAE])  # with D_SAE more than are active: a plain ReLU
@pytest.mark.parametrize("n_dead", [None, 0, 3, 6, 25, D_SAE])
def test_training_forward_equals_dense_autograd(cls: Any, rescale: bool, k: int, n_dead: int | None) -> None:
    sae = randomised(cls, k, rescale_acts_by_decoder_norm=rescale)
    truth = copy.deepcopy(sae).double()
    x = torch.randn(4, 16, D_IN)
    dead = None if n_dead is None else torch.randperm(D_SAE) < n_dead
    output = sae.training_forward(x, dead_mask=dead, aux_loss_coefficient=0.3)
    output.loss.backward()
    expected = dense_pass(truth, x.double(), dead)
    expected["loss"].backward()
    assert set(output.losses) == {"mse_loss"} | ({"auxiliary_reconstruction_loss"} if dead is not None else set())
    for name, value in output.losses.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=0, msg=name)
    torch.testing.assert_close(output.loss.double(), expected["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.sae_out.double().view(-1, D_IN), expected["sae_out"], rtol=1e-5, atol=1e-5)
    for name, parameter in truth.named_parameters():
        scale = parameter.grad.abs().max()
        error = (sae.get_parameter(name).grad - parameter.grad).abs().max() / scale
        assert error < 2e-6, f"{name}: {error:.3g} relative"
    active = expected["acts"] > 0
    assert torch.equal(output.feature_counts, active.sum(0))
    assert output.l0.item() == pytest.approx(active.sum(-1).double().mean().item())
    torch.testing.assert_close(output.acts.to_dense().double(), expected["acts"].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(D_IN,), (5, D_IN), (2, 3, D_IN), (0, D_IN)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"rescale_acts_by_decoder_norm": False}, {"apply_b_dec_to_input": False}, {"k": 1}, {"k": D_SAE}],
    ids=str,
)
def test_all_ways_to_reconstruct_agree(cls: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    sae, x = randomised(cls, **options), torch.randn(*shape)
    acts = sae.encode(x)
    assert acts.shape == (*shape[:-1], D_SAE)
    sparse = sae.encode_sparse(x)
    torch.testing.assert_close(sparse.to_dense().view_as(acts), acts)
    for out in (sae(x), sae.decode(acts), sae.decode(sparse).view_as(x)):
        assert out.shape == x.shape
        torch.testing.assert_close(out, sae(x))
    if cls is FusedTopKSAE:
        torch.testing.assert_close(acts.view(-1, D_SAE), dense_pass(sae, x)["acts"])
    else:
        gated = dense_pass(copy.deepcopy(sae).train(), x)  # k = D_SAE: every positive feature
        assert (acts == 0).logical_or(acts > 0.4).all()
        if options.get("k") == D_SAE:
            torch.testing.assert_close(acts.view(-1, D_SAE), gated["acts"] * (gated["acts"] > 0.4))


@pytest.mark.parametrize("cls", CLASSES)
def test_training_takes_a_single_token_and_an_empty_batch(cls: Any) -> None:
    sae = randomised(cls)
    x = torch.randn(D_IN)
    assert sae.training_forward(x).sae_out.shape == (D_IN,)
    before = sae.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    output = sae.training_forward(torch.zeros(0, D_IN), dead_mask=torch.ones(D_SAE, dtype=torch.bool))
    assert output.sae_out.shape == (0, D_IN)
    assert output.feature_counts.sum() == 0
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_names_are_those_of_saelens() -> None:
    names = {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert set(FusedTopKSAE(D_IN, D_SAE, 4).state_dict()) == names
    assert set(FusedBatchTopKSAE(D_IN, D_SAE, 4).state_dict()) == names | {"topk_threshold"}
    assert set(dict(FusedBatchTopKSAE(D_IN, D_SAE, 4).named_parameters())) == names
    assert not FusedTopKSAE(D_IN, D_SAE, 4).b_enc.any()


def test_a_decoder_row_of_zeros_is_no_nan() -> None:
    sae = randomised(FusedTopKSAE)
    with torch.no_grad():
        sae.W_dec[3] = 0
    output = sae.training_forward(torch.randn(20, D_IN), dead_mask=torch.arange(D_SAE) == 3)
    output.loss.backward()
    assert output.feature_counts[3] == 0
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize(
    ("k", "error"),
    [(0, ValueError), (41, ValueError), (-3, ValueError), (2.5, TypeError), (None, TypeError), (True, TypeError)],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_k(cls: Any, k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^k: expected an integer from 1 to d_sae = 40, got {k}$"):
        cls(D_IN, D_SAE, k)


def test_k_may_be_a_numpy_integer(tmp_path: Path) -> None:
    sae = FusedTopKSAE(D_IN, D_SAE, np.int64(4))  # type: ignore[arg-type]
    assert type(sae.k) is int
    sae.save(tmp_path)
    assert FusedTopKSAE.load(tmp_path).k == 4


@pytest.mark.parametrize("cls", CLASSES)
def test_torch_compile_runs(cls: Any) -> None:
    sae, x = randomised(cls), torch.randn(30, D_IN)
    compiled = torch.compile(sae, backend="eager")
    for tokens in (x, x.view(5, 6, D_IN)):
        torch.testing.assert_close(compiled(tokens), sae(tokens))


@pytest.mark.parametrize("cls", CLASSES)
def test_activations_encoded_again_are_those_of_the_pass_under_autocast(cls: Any) -> None:
    sae, x = randomised(cls), torch.randn(500, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        output = sae.training_forward(x)
    assert torch.equal(output.encode_again().to_dense(), output.acts.to_dense())
    outside = sae.training_forward(x).acts
    assert not torch.equal(output.acts.to_dense(), outside.to_dense())


@pytest.mark.parametrize("cls", CLASSES)
def test_a_module_made_in_inference_mode_runs_there(cls: Any) -> None:
    x = torch.randn(9, D_IN)
    expected = randomised(cls).training_forward(x)
    with torch.inference_mode():
        output = randomised(cls).training_forward(x)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.encode_again().to_dense(), expected.acts.to_dense())


@pytest.mark.parametrize("cls", CLASSES)
def test_nan_is_reported(cls: Any) -> None:
    sae, x = randomised(cls), torch.randn(4, D_IN)
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        sae.training_forward(x)
    with pytest.raises(ValueError, match="of x is not finite"):
        sae.encode_sparse(x)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_auxiliary_gradient_reaches_the_encoder_of_dead_features_alone(cls: Any) -> None:
    sae, x = randomised(cls), torch.randn(50, D_IN)
    dead = torch.arange(D_SAE) % 4 == 0
    loss = sae.training_forward(x, dead_mask=dead).losses["auxiliary_reconstruction_loss"]
    grads = torch.autograd.grad(loss, [sae.W_enc, sae.b_enc, sae.W_dec])
    for by_feature in (grads[0].t(), grads[1][:, None], grads[2]):
        assert (by_feature[dead].abs().sum(-1) > 0).all()
        assert not by_feature[~dead].any()


def test_dead_ids_are_looked_up_once_per_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    original = torch.Tensor.nonzero
    sae, x, dead = randomised(FusedTopKSAE), torch.randn(20, D_IN), torch.arange(D_SAE) < 9

    def nonzero(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.dtype == torch.bool and self.shape == (D_SAE,):
            looked.append(int(self.sum()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "nonzero", nonzero)
    first = sae.training_forward(x, dead_mask=dead).loss
    assert torch.equal(sae.training_forward(x, dead_mask=dead).loss, first)
    assert looked == [9]
    dead[9:15] = True  # the same object with other content
    changed = sae.training_forward(x, dead_mask=dead).loss
    assert looked == [9, 15]
    assert changed != first
    assert torch.equal(sae.training_forward(x, dead_mask=dead.clone()).loss, changed)
    assert looked == [9, 15, 15]
    with torch.inference_mode():
        untracked = torch.arange(D_SAE) < 9  # has no version that would tell of a change
    for _ in range(2):
        assert torch.equal(sae.training_forward(x, dead_mask=untracked).loss, first)
    assert looked[3:] == [9, 9]


def test_aux_pass_holds_no_tensor_of_tokens_by_features(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    original = kernels.autoencode

    def autoencode(x: Any, W_enc: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append((tuple(W_enc.shape), kwargs["spec"].k, W_enc.t().is_contiguous()))  # type: ignore[arg-type]
        return original(x, W_enc, *args, **kwargs)

    monkeypatch.setattr(kernels, "autoencode", autoencode)
    sae = randomised(FusedTopKSAE)
    for n_dead in (3, 20):
        sae.training_forward(torch.randn(20, D_IN), dead_mask=torch.arange(D_SAE) < n_dead)
    assert shapes[1::2] == [((D_IN, 3), None, True), ((D_IN, 20), D_IN // 2, True)]


@pytest.mark.parametrize(
    "mask", [torch.full((D_SAE,), 0.5), torch.ones(D_SAE + 1, dtype=torch.bool)], ids=["dtype", "shape"]
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_dead_mask(cls: Any, mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=rf"dead_mask: expected bool, .* of shape \[d_sae\] = \({D_SAE},\), got "):
        randomised(cls).training_forward(torch.randn(3, D_IN), dead_mask=mask)
    with pytest.raises(TypeError, match=r"^dead_mask: expected a torch\.Tensor, got list$"):
        randomised(cls).training_forward(torch.randn(3, D_IN), dead_mask=mask.tolist())


@needs_kernels
@pytest.mark.parametrize("cls", CLASSES)
def test_the_triton_kernels_give_the_same_step(cls: Any) -> None:
    from fastsae_kernels.gpu import config

    sae, x, dead = randomised(cls), torch.randn(8, D_IN), torch.arange(D_SAE) < 9
    expected, other = sae.training_forward(x, dead_mask=dead), randomised(cls).to(DEVICE)
    expected.loss.backward()
    tiles = {name: {"16": values, "32": values} for name, values in FEW_PROGRAMS.items()}
    few = config.override(tiles) if DEVICE == "cpu" else contextlib.nullcontext()
    with kernels.use_backend("triton"), few:
        got = other.training_forward(x.to(DEVICE), dead_mask=dead.to(DEVICE))
        got.loss.backward()
        acts = got.acts
    assert torch.equal(acts.to_dense().cpu() > 0, expected.acts.to_dense() > 0)
    torch.testing.assert_close(got.loss.cpu(), expected.loss)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).grad.cpu(), parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    if cls is FusedBatchTopKSAE:
        torch.testing.assert_close(other.topk_threshold.cpu(), sae.topk_threshold)
