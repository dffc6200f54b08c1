"""The modules' contract: names, shapes, dtypes, gradients, files."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsae_kernels as kernels
from fastsae import FusedJumpReLUSAE, FusedReLUSAE, SparseAutoencoder
from fastsae_kernels import reference
from fastsae_kernels.backend import BackendName as Backend

CLASSES = [FusedJumpReLUSAE, FusedReLUSAE]


def randomised(cls: type[SparseAutoencoder], **options: object) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = cls(12, 40, **options)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.3)
        if isinstance(sae, FusedJumpReLUSAE):
            sae.threshold.uniform_(0.1, 0.6)
    return sae


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": True}, {"k": 3}], ids=str)
def test_all_ways_to_reconstruct_agree(cls: type[SparseAutoencoder], shape: tuple[int, ...], options: dict) -> None:
    sae, x = randomised(cls, **options), torch.randn(*shape)
    acts = sae.encode(x)
    assert acts.shape == (*shape[:-1], 40)
    sparse = sae.encode_sparse(x)
    torch.testing.assert_close(sparse.to_dense().view_as(acts), acts)
    expected = acts @ sae.W_dec + sae.b_dec
    for out in (sae(x), sae.decode(acts), sae.decode(sparse).view_as(x)):
        assert out.shape == x.shape
        torch.testing.assert_close(out, expected)
    if options.get("k"):
        assert sparse.l0().le(3).all()


def test_parameters_have_saelens_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in FusedJumpReLUSAE(12, 40).state_dict().items()}
    assert shapes == {"W_enc": (12, 40), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,), "threshold": (40,)}
    assert set(FusedReLUSAE(12, 40).state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_threshold_stays_fp32_and_weights_keep_their_layout() -> None:
    sae = FusedJumpReLUSAE(12, 40, init_threshold=0.123)
    before = sae.threshold.detach().clone()
    sae.to(torch.bfloat16)
    assert sae.dtype == torch.bfloat16
    assert sae.threshold.dtype == torch.float32
    assert torch.equal(sae.threshold, before)  # not rounded on the way
    assert sae(torch.randn(3, 12)).dtype == torch.bfloat16
    for strides in ((40, 1), (1, 12)):
        for module in (sae, copy.deepcopy(sae), sae.float()):
            assert module.W_enc.stride() == strides
        sae.store_by_feature_()


@pytest.mark.parametrize("sparsity", ["step", "quadratic", "tanh"])
def test_training_forward_equals_dense_autograd(sparsity: str) -> None:
    sae, x = randomised(FusedJumpReLUSAE), torch.randn(64, 12)
    dense = copy.deepcopy(sae)
    dead = torch.arange(40) % 5 == 0
    output = sae.training_forward(x, 0.3, sparsity, target_l0=5.0, dead_mask=dead, pre_act_loss_coefficient=0.01)
    output.loss.backward()

    hidden_pre = reference.hidden_pre(x, dense.W_enc, dense.b_enc)
    acts = reference.JumpReLU.apply(hidden_pre, dense.threshold, dense.bandwidth, False)
    l0 = reference.Step.apply(hidden_pre, dense.threshold, dense.bandwidth, False).sum(-1)
    norms = dense.W_dec.norm(dim=1)
    penalty = {"step": l0, "quadratic": 2 / 5 * (l0 - 5) ** 2, "tanh": torch.tanh(4 * acts * norms).sum(-1)}[sparsity]
    out = acts @ dense.W_dec + dense.b_dec
    pull = (torch.relu(dense.threshold - hidden_pre) * dead * norms).sum(-1)
    loss = (out - x).square().sum(-1).mean() + 0.3 * penalty.mean() + 0.01 * pull.mean()
    loss.backward()

    torch.testing.assert_close(output.loss, loss)
    assert output.loss.item() == pytest.approx(sum(term.item() for term in output.losses.values()), rel=1e-5)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert output.l0.item() == pytest.approx((acts > 0).sum(-1).float().mean().item())
    fvu = (out - x).square().sum() / (x - x.mean(0)).square().sum()
    assert output.fvu.item() == pytest.approx(fvu.item(), rel=1e-5)
    assert torch.equal(output.feature_counts, (acts > 0).sum(0))
    torch.testing.assert_close(output.acts.to_dense(), acts.detach())


@pytest.mark.parametrize("scaled", [False, True])
def test_relu_training_forward(scaled: bool) -> None:
    sae, x = randomised(FusedReLUSAE), torch.randn(64, 12)
    output = sae.training_forward(x, 0.3, scale_by_decoder_norm=scaled)
    acts = torch.relu(x @ sae.W_enc + sae.b_enc)
    norms = sae.W_dec.norm(dim=1) if scaled else torch.ones(40)
    expected = (acts @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean() + 0.3 * (acts * norms).sum(-1).mean()
    torch.testing.assert_close(output.loss, expected)
    grads = torch.autograd.grad(output.loss, list(sae.parameters()))
    for got, want in zip(grads, torch.autograd.grad(expected, list(sae.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_input_gradient_and_sparse_encode_gradient() -> None:
    sae = randomised(FusedJumpReLUSAE, apply_b_dec_to_input=True)
    x = torch.randn(9, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(sae(x).square().sum(), x)
    (expected,) = torch.autograd.grad(sae.decode(sae.encode(x)).square().sum(), x)
    torch.testing.assert_close(grad, expected)
    (sparse,) = torch.autograd.grad(sae.decode(sae.encode_sparse(x)).square().sum(), x)
    torch.testing.assert_close(sparse, expected)


def test_dense_phase_reports_activations_on_demand() -> None:
    torch.manual_seed(0)
    sae = FusedJumpReLUSAE(12, 4096, init_threshold=0.0)
    output = sae.training_forward(torch.randn(300, 12), 1.0)
    assert output.sparse_acts is None
    assert output.l0 > 1000
    # half of all pre-activations lie around the threshold of 0, so a few flip with the order of summation
    assert output.acts.l0().float().mean().item() == pytest.approx(output.l0.item(), rel=1e-4)


def test_sparse_acts_topk_and_active() -> None:
    sae, x = randomised(FusedReLUSAE), torch.randn(20, 12)
    acts = sae.encode_sparse(x)
    top = acts.topk(2)
    values, indices = torch.sort(acts.to_dense(), dim=1, descending=True, stable=True)
    expected = torch.zeros(20, 40).scatter_(1, indices[:, :2], values[:, :2])
    torch.testing.assert_close(top.to_dense(), expected)
    assert top.l0().tolist() == acts.l0().clamp(max=2).tolist()
    with pytest.raises(ValueError, match="k"):
        acts.topk(0)


@pytest.mark.parametrize("cls", CLASSES)
def test_round_trip_on_disk(cls: type[SparseAutoencoder], tmp_path: Path) -> None:
    sae = randomised(cls, apply_b_dec_to_input=True).to(torch.bfloat16)
    sae.save(tmp_path / "new" / "folder", model_name="m")
    loaded = SparseAutoencoder.load(tmp_path / "new" / "folder")
    assert type(loaded) is cls
    assert loaded.dtype == torch.bfloat16
    assert loaded.metadata["model_name"] == "m"
    assert loaded.config() == sae.config()
    x = torch.randn(5, 12)
    assert torch.equal(loaded(x), sae(x))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_fold_activation_scale_is_exact() -> None:
    sae, x = randomised(FusedJumpReLUSAE), torch.randn(50, 12)
    expected = sae(x * 0.25) / 0.25
    sae.fold_activation_scale_(0.25)
    assert torch.equal(sae(x), expected)  # a power of two rounds nothing


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        SparseAutoencoder.load(tmp_path)
    sae = randomised(FusedJumpReLUSAE)
    sae.save(tmp_path)
    with pytest.raises(ValueError, match="FusedReLUSAE"):
        FusedReLUSAE.load(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for change, word in (
        ({"architecture": "gated"}, "gated"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"d_sae": 41}, "expected the tensors"),
        ({"d_in": "x"}, "d_in: expected an integer from 1 to .*, got 'x'"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=word):
            SparseAutoencoder.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="corrupt"):
        SparseAutoencoder.load(tmp_path)
    sae.save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"d_sae": 0},
        {"d_in": True},
        {"d_in": "12"},
        {"d_sae": 40.0},
        {"k": 41},
        {"k": 0},
        {"bandwidth": 0.0},
        {"bandwidth": math.inf},
        {"init_threshold": -1.0},
        {"init_threshold": math.nan},
    ],
    ids=str,
)
def test_bad_construction(options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*, got {value!r}$"):
        FusedJumpReLUSAE(**{"d_in": 12, "d_sae": 40, **options})


@pytest.mark.parametrize("cls", CLASSES)
def test_losses_of_an_fp64_module_are_fp64(cls: type[SparseAutoencoder]) -> None:
    sae, x = randomised(cls).double(), torch.randn(20, 12, dtype=torch.float64)
    options = {"sparsity": "tanh"} if cls is FusedJumpReLUSAE else {}
    output = sae.training_forward(x, 0.3, **options)  # type: ignore[operator]
    assert output.loss.dtype == output.losses["mse_loss"].dtype == torch.float64
    error = (sae.decode(sae.encode(x)) - x).square().sum(-1).mean()
    torch.testing.assert_close(output.losses["mse_loss"], error, rtol=1e-12, atol=0)


def test_bad_calls_name_the_argument() -> None:
    sae = FusedJumpReLUSAE(12, 40)
    x = torch.randn(3, 12)
    with pytest.raises(ValueError, match=r"x: expected last dimension d_in = 12, got shape \(3, 11\)"):
        sae(torch.randn(3, 11))
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got list"):
        sae([1.0] * 12)
    with pytest.raises(ValueError, match="acts: expected last dimension d_sae = 40"):
        sae.decode(torch.randn(3, 41))
    with pytest.raises(TypeError, match=r"^acts: expected a torch\.Tensor or SparseActs, got list$"):
        sae.decode([0.0] * 40)
    with pytest.raises(TypeError, match="x: expected a floating-point"):
        sae(torch.ones(3, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="sparsity"):
        sae.training_forward(x, 1.0, "l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_l0"):
        sae.training_forward(x, 1.0, "quadratic")
    with pytest.raises(ValueError, match="dead_mask"):
        sae.training_forward(x, 1.0, dead_mask=torch.full((40,), 0.5))
    weights = (sae.W_enc, sae.b_enc, sae.threshold)
    with pytest.raises(TypeError, match="W_enc"):
        kernels.encode(x.double(), *weights)
    with pytest.raises(TypeError, match="threshold"):
        kernels.encode(x.bfloat16(), *(w.bfloat16() for w in weights))
    with pytest.raises(ValueError, match="k: expected at most"):
        kernels.encode(x, *weights, k=41)
    with pytest.raises(ValueError, match="W_dec"):
        kernels.decode(kernels.encode(x, *weights), nn.Parameter(torch.zeros(41, 12)))


def test_two_passes_before_one_backward() -> None:
    sae = randomised(FusedJumpReLUSAE)
    x = torch.randn(2, 30, 12)
    (sae(x[0]).sum() + sae.training_forward(x[0], 1.0).loss + sae.training_forward(x[1], 1.0).loss).backward()
    got = sae.W_dec.grad.clone()
    sae.zero_grad()
    for loss in (
        lambda: sae(x[0]).sum(),
        lambda: sae.training_forward(x[0]).loss,
        lambda: sae.training_forward(x[1]).loss,
    ):
        loss().backward()
    torch.testing.assert_close(got, sae.W_dec.grad)


def test_edited_activations_reach_the_decoder_gradient() -> None:
    sae = randomised(FusedJumpReLUSAE)
    acts = sae.encode_sparse(torch.randn(30, 12))
    edited = dataclasses.replace(acts, values=acts.values.detach() * 3)
    grad_out = torch.randn(30, 12)
    (got,) = torch.autograd.grad(sae.decode(edited), sae.W_dec, grad_out)
    torch.testing.assert_close(got, edited.to_dense().t() @ grad_out)


def test_sparse_activations_are_freed_without_the_garbage_collector() -> None:
    sae = randomised(FusedJumpReLUSAE)
    gc.disable()
    try:
        acts = sae.encode_sparse(torch.randn(30, 12))
        values = weakref.ref(acts.values)
        del acts
        assert values() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_autocast_is_the_same_as_narrow_weights_and_wide_biases(backend: Backend) -> None:
    sae, x = randomised(FusedJumpReLUSAE), torch.randn(30, 12)
    narrow = copy.deepcopy(sae).to(torch.bfloat16)
    narrow.b_enc.data, narrow.b_dec.data = sae.b_enc.detach().clone(), sae.b_dec.detach().clone()
    with kernels.use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            output, reconstructed = sae.training_forward(x), sae(x)
            sparse = sae.decode(sae.encode_sparse(x))
        expected = narrow.training_forward(x)
        expected_sparse = narrow.decode(narrow.encode_sparse(x))
        expected_out = narrow(x)
    assert output.residual.dtype == reconstructed.dtype == torch.bfloat16
    assert torch.equal(reconstructed, expected_out)
    assert torch.equal(sparse, expected_sparse)
    output.loss.backward()
    expected.loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad.dtype == torch.float32  # for fp32 weights, which small updates do not vanish in
        torch.testing.assert_close(parameter.grad, narrow.get_parameter(name).grad.float(), rtol=2e-2, atol=2e-2)


def test_torch_compile_runs() -> None:
    sae, x = randomised(FusedJumpReLUSAE), torch.randn(30, 12)
    compiled = torch.compile(sae, backend="eager")
    torch.testing.assert_close(compiled(x), sae(x))


def test_frozen_sae_passes_the_input_gradient_alone() -> None:
    sae = randomised(FusedJumpReLUSAE).requires_grad_(False)
    x = torch.randn(30, 12, requires_grad=True)
    sae(x).square().sum().backward()
    (expected,) = torch.autograd.grad(sae.decode(sae.encode(x)).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_activations_of_changed_weights_are_refused() -> None:
    sae = FusedJumpReLUSAE(12, 4096, init_threshold=0.0)
    output = sae.training_forward(torch.randn(300, 12), 1.0)
    with torch.no_grad():
        sae.W_enc.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        output.acts  # noqa: B018


def test_fine_tuning_a_folded_sae_has_the_same_threshold_gradient() -> None:
    sae, x = randomised(FusedJumpReLUSAE, bandwidth=0.5), torch.randn(200, 12)
    counts = sae.training_forward(x * 0.25, 1.0)
    (before,) = torch.autograd.grad(counts.losses["l0_loss"], sae.threshold)
    sae.fold_activation_scale_(0.25)
    (after,) = torch.autograd.grad(sae.training_forward(x, 1.0).losses["l0_loss"], sae.threshold)
    torch.testing.assert_close(after, before * 0.25)  # the same window members, in units four times as large


def test_nan_is_reported() -> None:
    sae, x = FusedJumpReLUSAE(12, 40), torch.randn(4, 12)
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match="of x is not finite"):
        sae.encode_sparse(x)
    assert sae(x)[2].isnan().all()
