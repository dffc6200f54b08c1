"""What SAELens' tools ask of an SAE object: `cfg`, folding, copies of its objects, its masks and sparse tensors."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder

D_IN, D_SAE = 24, 80
WIDTHS = {"d_in": D_IN, "d_sae": D_SAE}
MAKE = {
    "jumprelu": lambda **options: FusedJumpReLUSAE(**WIDTHS, **options),
    "log threshold": lambda **options: FusedJumpReLUSAE(**WIDTHS, log_threshold=True, **options),
    "standard": lambda **options: FusedReLUSAE(**WIDTHS, **options),
    "topk": lambda **options: FusedTopKSAE(**WIDTHS, k=8, **options),
    "batchtopk": lambda **options: FusedBatchTopKSAE(**WIDTHS, k=8, **options),
}
MODULES = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def fill(sae: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            values = torch.randn(tensor.shape, generator=g) / max([1, *tensor.shape[:1]]) ** 0.5
            tensor.copy_(values.abs() + 0.05 if "threshold" in name else values)
            if name == "W_dec":
                tensor.mul_(torch.linspace(0.2, 3, D_SAE)[:, None])
    return sae


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1), dtype=dtype)


@MODULES
def test_cfg_says_what_the_sae_is_now(make: Any) -> None:
    sae = make(apply_b_dec_to_input=True)
    sae.metadata |= {"hook_name": "blocks.3.hook_resid_post", "context_size": 64}
    cfg = sae.cfg
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.device) == (D_IN, D_SAE, "float32", "cpu")
    assert (cfg.normalize_activations, cfg.reshape_activations, cfg.apply_b_dec_to_input) == ("none", "none", True)
    assert cfg.architecture() == sae.architecture
    assert (cfg.metadata.hook_name, cfg.metadata["context_size"]) == ("blocks.3.hook_resid_post", 64)
    assert cfg.metadata.neuronpedia_id is None
    assert cfg.metadata.get("prepend_bos", True) is True
    assert "prepend_bos" not in cfg.metadata
    sae.to(torch.bfloat16)
    sae.metadata["context_size"] = 128
    assert (cfg.dtype, cfg.metadata.context_size) == ("bfloat16", 128)
    assert cfg.hook_name == "blocks.3.hook_resid_post"  # where SAELens had it before version 6
    assert not hasattr(cfg, "prepend_bos")


@MODULES
def test_cfg_is_read_only_where_it_says_what_the_sae_is(make: Any) -> None:
    cfg = make().to(torch.bfloat16).cfg
    cfg.dtype = "bfloat16"  # what evaluations write after `sae.to`: it is so already
    for name in ("dtype", "d_sae", "architecture", "metadata", "_sae", "reshape_activations"):
        with pytest.raises(AttributeError, match=rf"^cfg\.{name}: it says what the SAE is; change the SAE itself"):
            setattr(cfg, name, "other")
    assert cfg.dtype == "bfloat16"


@MODULES
def test_notes_of_tools_are_kept_in_the_metadata(make: Any, tmp_path: Path) -> None:
    sae = make()
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.cfg.metadata["model_name"] = "m"
    sae.cfg.hook_layer = 3
    sae.cfg.metadata = sae.cfg.metadata
    expected = {"hook_name": "blocks.3.hook_resid_post", "model_name": "m", "hook_layer": 3}
    assert sae.metadata == sae.cfg.metadata.to_dict() == expected
    sae.save(tmp_path)
    assert SparseAutoencoder.load(tmp_path).cfg.hook_layer == 3


@MODULES
def test_cfg_can_be_copied_printed_and_pickled(make: Any) -> None:
    cfg = make().cfg
    cfg.metadata.hook_name = "a"
    for other in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert other == cfg
        assert other.metadata == cfg.metadata
        other.metadata.hook_name = "b"
        assert cfg.metadata.hook_name == "a"
    metadata = copy.deepcopy(cfg.metadata)
    assert metadata == cfg.metadata == pickle.loads(pickle.dumps(metadata))
    assert "'d_sae': 80" in repr(cfg)
    assert "jumprelu_bandwidth" in dir(cfg) or cfg.architecture() != "jumprelu"


def theirs_of(kind: str, **options: Any) -> Any:
    sae_lens = pytest.importorskip("sae_lens")
    training = kind.endswith("training")
    name = {"jumprelu": "JumpReLU", "standard": "Standard", "topk": "TopK", "batchtopk": "BatchTopK"}[kind.split()[0]]
    kept = "Training" if training else ""
    config = getattr(sae_lens, f"{name}{kept}SAEConfig")(**WIDTHS, **options)
    return fill(getattr(sae_lens, f"{name}{kept}SAE")(config))


OPTIONS: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "standard": {"apply_b_dec_to_input": False},
    "topk": {"k": 8, "rescale_acts_by_decoder_norm": True},
    "jumprelu training": {
        "jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.25, "jumprelu_ste_to_input": True
    },
    "standard training": {},
    "topk training": {"k": 8},
    "batchtopk training": {"k": 8, "topk_threshold_lr": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_copy_of_an_object_of_saelens_has_its_options_and_numbers(kind: str) -> None:
    theirs = theirs_of(kind, **OPTIONS[kind])
    theirs.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    ours = SparseAutoencoder.from_saelens(theirs)
    for name in theirs.cfg.to_dict():
        if name not in ("metadata", "architecture") and hasattr(ours.cfg, name):
            assert getattr(ours.cfg, name) == getattr(theirs.cfg, name), name
    for name, value in OPTIONS[kind].items():
        assert getattr(ours.cfg, name) == value
    assert ours.cfg.architecture() == theirs.cfg.architecture()
    assert ours.metadata["hook_name"] == "blocks.3.hook_resid_post"
    x = inputs(50)
    if not kind.startswith("batchtopk"):  # whose training class chooses by batch
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
    with torch.no_grad():
        ours.b_dec.add_(1)
    assert (theirs.b_dec < ours.b_dec).all()  # its own memory


def test_a_copy_of_a_narrow_object_is_as_narrow() -> None:
    ours = FusedJumpReLUSAE.from_saelens(theirs_of("jumprelu training").to(torch.bfloat16))
    assert (ours.dtype, ours.threshold.dtype) == (torch.bfloat16, torch.float32)


def test_objects_that_cannot_be_copied_are_named() -> None:
    sae_lens = pytest.importorskip("sae_lens")
    with pytest.raises(TypeError, match="sae: expected an SAE of SAELens, got Linear"):
        SparseAutoencoder.from_saelens(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="got 'gated'"):
        SparseAutoencoder.from_saelens(sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**WIDTHS)))
    with pytest.raises(ValueError, match="FusedTopKSAE runs, got architecture 'standard'"):
        FusedTopKSAE.from_saelens(theirs_of("standard"))
    with pytest.raises(ValueError, match="normalize_activations: expected 'none', got 'layer_norm'"):
        FusedReLUSAE.from_saelens(theirs_of("standard", normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="reshape_activations: expected 'none', got 'hook_z'"):
        FusedReLUSAE.from_saelens(theirs_of("standard", reshape_activations="hook_z"))


@MODULES
@pytest.mark.parametrize("subtract", [False, True], ids=["", "subtracts b_dec"])
@pytest.mark.parametrize("by_feature", [False, True], ids=["", "by feature"])
def test_folding_gives_unit_rows_and_leaves_the_reconstruction(make: Any, subtract: bool, by_feature: bool) -> None:
    sae = fill(make(apply_b_dec_to_input=subtract))
    with torch.no_grad():
        sae.W_dec[5] = 0
    if by_feature:
        sae.store_by_feature_()
    x, norms = inputs(300, dtype=torch.float64), sae.decoder_norms().double()
    sae.double()
    before, acts = sae(x), sae.encode(x)
    assert (acts > 0).any()
    sae.fold_W_dec_norm()
    expected = torch.ones(D_SAE, dtype=torch.float64)
    expected[5] = 0
    torch.testing.assert_close(sae.decoder_norms(), expected)
    torch.testing.assert_close(sae(x), before)
    scaled = acts if sae.architecture.endswith("topk") else acts * norms.clamp_min(1e-8)
    torch.testing.assert_close(sae.encode(x), scaled)


@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if kind.split()[0] != "batchtopk"])
def test_folding_does_what_saelens_does(kind: str) -> None:
    theirs = theirs_of(kind, **OPTIONS[kind])
    ours, x = SparseAutoencoder.from_saelens(theirs), inputs(100)
    theirs.fold_W_dec_norm()
    ours.fold_W_dec_norm()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedTopKSAE(**WIDTHS, k=8, rescale_acts_by_decoder_norm=False),
        lambda: FusedBatchTopKSAE(**WIDTHS, k=8, rescale_acts_by_decoder_norm=False),
        lambda: FusedJumpReLUSAE(**WIDTHS, k=8),
    ],
)
def test_folding_is_refused_where_it_would_choose_other_features(make: Any) -> None:
    sae = make()
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(NotImplementedError, match="fold_W_dec_norm: the k largest activations"):
        sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.state_dict(), before, rtol=0, atol=0)


def test_folding_is_refused_where_a_parametrization_would_undo_half_of_it() -> None:
    sae = fill(MAKE["jumprelu"]())
    nn.utils.parametrizations.weight_norm(sae, "W_dec")
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(NotImplementedError, match="remove the parametrization"):
        sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.state_dict(), before, rtol=0, atol=0)


def test_reshaping_is_off_and_stays_off() -> None:
    sae = FusedReLUSAE(**WIDTHS)
    assert sae.hook_z_reshaping_mode is False
    for hook_name in (None, "blocks.3.attn.hook_z"):
        sae.metadata["hook_name"] = hook_name
        sae.turn_off_forward_pass_hook_z_reshaping()
        sae.turn_on_forward_pass_hook_z_reshaping()
        assert sae.hook_z_reshaping_mode is False
    with pytest.raises(ValueError):
        sae(torch.zeros(3, 2, sae.d_in // 2))  # heads that are apart are never taken for tokens
    sae.metadata["hook_name"] = "blocks.3.hook_resid_post"
    with pytest.raises(ValueError, match=r"expected an SAE of attention heads, got one of blocks\.3\.hook_resid_post"):
        sae.turn_on_forward_pass_hook_z_reshaping()  # as SAELens' own do


@MODULES
def test_initial_decoder_rows_have_the_length_that_is_asked_for(make: Any) -> None:
    torch.manual_seed(0)
    unit = make()
    torch.manual_seed(0)
    short = make(decoder_init_norm=0.1)
    torch.testing.assert_close(short.decoder_norms(), torch.full((D_SAE,), 0.1))
    torch.testing.assert_close(short.W_dec, unit.W_dec * 0.1)
    assert torch.equal(short.W_enc, short.W_dec.t())
    for wrong in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="decoder_init_norm: expected a finite number > 0"):
            make(decoder_init_norm=wrong)


@MODULES
def test_the_initial_length_is_kept_in_files(make: Any, tmp_path: Path) -> None:
    make(decoder_init_norm=0.25).save(tmp_path)
    assert SparseAutoencoder.load(tmp_path).decoder_init_norm == 0.25
    content = json.loads((tmp_path / "cfg.json").read_text())
    del content["metadata"]["fastsae"]["decoder_init_norm"]  # a file of an earlier version
    (tmp_path / "cfg.json").write_text(json.dumps(content))
    assert SparseAutoencoder.load(tmp_path).decoder_init_norm == 1.0


@pytest.mark.parametrize("kind", ["jumprelu training", "batchtopk training"])
@pytest.mark.parametrize("norm", [0.1, 0.3, None])
def test_the_initial_length_of_saelens_is_taken_over(kind: str, norm: float | None, tmp_path: Path) -> None:
    theirs = theirs_of(kind, **{**OPTIONS[kind], "decoder_init_norm": norm})
    theirs.save_model(str(tmp_path))
    for sae in (SparseAutoencoder.from_saelens(theirs), SparseAutoencoder.load(tmp_path)):
        assert sae.decoder_init_norm == (1.0 if norm is None else norm)


@pytest.mark.parametrize("scale", [0.5, 4.0, 20.0])
def test_the_tanh_loss_has_the_scale_of_saelens(scale: float) -> None:
    theirs = theirs_of("jumprelu training", jumprelu_sparsity_loss_mode="tanh", jumprelu_tanh_scale=scale)
    from sae_lens.saes.sae import TrainStepInput

    ours, x = FusedJumpReLUSAE.from_saelens(theirs), inputs(200)
    step = TrainStepInput(
        sae_in=x, coefficients={"l0": 0.5}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False
    )
    expected = theirs.training_forward_pass(step)
    got = ours.training_forward(x, 0.5, "tanh", tanh_scale=scale)
    torch.testing.assert_close(got.losses["l0_loss"], expected.losses["l0_loss"])
    expected.loss.backward()
    got.loss.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tanh_scale: expected a finite number > 0, got 0"):
        ours.training_forward(x, 0.5, "tanh", tanh_scale=0)


def test_the_running_threshold_moves_at_the_rate_of_saelens(tmp_path: Path) -> None:
    theirs = theirs_of("batchtopk training", k=8, topk_threshold_lr=0.25)
    from sae_lens.saes.sae import TrainStepInput

    ours = FusedBatchTopKSAE.from_saelens(theirs)
    assert ours.topk_threshold_lr == 0.25
    for seed in range(3):
        x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(seed))
        theirs.training_forward_pass(
            TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)
        )
        ours.training_forward(x)
    torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=1e-6, atol=0)
    ours.save(tmp_path)
    assert FusedBatchTopKSAE.load(tmp_path).topk_threshold_lr == 0.25
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="topk_threshold_lr: expected a number > 0 and <= 1"):
            FusedBatchTopKSAE(**WIDTHS, k=8, topk_threshold_lr=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_a_mask_of_zeros_and_ones_is_that_of_their_truth(kind: str, dtype: torch.dtype) -> None:
    mask, x = torch.arange(D_SAE) % 3 == 0, inputs(40)
    results = []
    for dead in (mask, mask.to(dtype)):
        sae = fill(MAKE[kind]())
        output = sae.training_forward(x, dead_mask=dead)
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad for p in sae.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_mask_of_numbers_is_looked_at_again_once_it_has_changed() -> None:
    sae, x, mask = fill(MAKE["topk"]()), inputs(40), torch.ones(D_SAE)
    sae.training_forward(x, dead_mask=mask)
    mask.zero_()
    assert sae.training_forward(x, dead_mask=mask).losses["auxiliary_reconstruction_loss"] == 0


SHAPES = [(7,), (3, 5), (2, 3, 4), (0,), (2, 0), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_sparse_tensors_of_any_dimensions_are_decoded(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sae = fill(MAKE[kind]()).to(dtype)
    acts = sae.encode(inputs(*shape).to(dtype))
    torch.testing.assert_close(sae.decode(acts.to_sparse()), sae.decode(acts))


def test_sparse_tensors_of_other_layouts_edits_and_gradients() -> None:
    sae = fill(MAKE["jumprelu"]())
    acts = sae.encode(inputs(6)).detach() - 0.5  # no activations: negative, and nowhere zero
    for sparse in (acts.to_sparse_csr(), acts.to_sparse_csc(), torch.stack([acts, acts])[0].to_sparse()):
        torch.testing.assert_close(sae.decode(sparse), sae.decode(acts))
    twice = torch.sparse_coo_tensor([[0, 0], [3, 3]], [1.0, 2.0], (1, D_SAE))
    torch.testing.assert_close(sae.decode(twice), sae.decode(twice.to_dense()))
    with pytest.raises(TypeError, match="acts: expected a sparse tensor without dense dimensions, got 1 of them"):
        sae.decode(acts.to_sparse(1))
    with pytest.raises(ValueError, match="acts: expected last dimension d_sae = 80"):
        sae.decode(torch.ones(3, 41).to_sparse())
    grads = []
    for leaf in (acts.clone().requires_grad_(), acts.to_sparse().requires_grad_()):
        sae.zero_grad()
        sae.decode(leaf).square().sum().backward()
        grads.append([leaf.grad.to_dense(), sae.W_dec.grad, sae.b_dec.grad])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", ["jumprelu", "standard"])
def test_the_calls_of_saedashboard_go_through(kind: str) -> None:
    """It encodes with the weights of a few features in the place of all, and puts the others back."""
    sae, ids, x = fill(MAKE[kind]()), [3, 70, 5], inputs(2, 16)
    expected, before = sae.encode(x)[..., ids], dict(sae.named_parameters())
    assert isinstance(sae.activation_fn, nn.ReLU)
    for name, parameter in before.items():
        if name != "b_dec":
            setattr(sae, name, nn.Parameter(parameter[:, ids] if name == "W_enc" else parameter[ids]))
    torch.testing.assert_close(sae.encode(x), expected)
    for name, parameter in before.items():
        setattr(sae, name, parameter)
    torch.testing.assert_close(sae.encode(x)[..., ids], expected)


def test_the_activation_function_tells_topk_from_others() -> None:
    topk_sae = pytest.importorskip("sae_lens.saes.topk_sae")
    activation = MAKE["topk"]().activation_fn
    assert isinstance(activation, topk_sae.TopK)
    assert activation.k == 8
    assert "activation_fn" not in dict(MAKE["topk"]().named_modules())


def test_the_calls_of_saebench_go_through() -> None:
    """Core evaluation: reshaping off, `cfg` read, decoder rows of unit norm after a fold, encode then decode."""
    sae = fill(MAKE["jumprelu"]())
    sae.metadata |= {"hook_name": "blocks.3.hook_resid_post", "model_name": "m"}
    sae = sae.to(device="cpu", dtype=torch.float32)
    sae.cfg.dtype = "float32"
    sae.turn_off_forward_pass_hook_z_reshaping()
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert int(sae.cfg.metadata.hook_name.split(".")[1]) == 3
    x = inputs(2, 16)
    feature_acts = sae.encode(x)
    assert feature_acts.shape == (2, 16, sae.cfg.d_sae)
    assert sae.W_dec.shape == (sae.cfg.d_sae, sae.cfg.d_in)
    torch.testing.assert_close(sae.decode(feature_acts), sae(x))
    cosine = nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1)
    assert cosine.shape == (D_SAE,)
