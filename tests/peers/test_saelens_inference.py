"""`accelerate` against the real SAELens at inference: the pair of encode and decode, edits, hooks and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saelens_problem import (
    D_IN,
    N_TOKENS,
    activations,
    close,
    inference_sae,
    sae_lens,
)

from fastsae import accelerate


@pytest.mark.parametrize("name", ["JumpReLU", "Standard", "TopK"])
@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("shape", [(N_TOKENS,), (4, 8), ()], ids=str)
def test_inference(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    theirs, ours = inference_sae(name, **options), inference_sae(name, **options)
    handle = accelerate(ours)
    x = activations(0)[: max(1, torch.Size(shape).numel())].reshape(*shape, D_IN)
    with torch.no_grad():
        acts, dense = ours.encode(x), theirs.encode(x)
        pairs = [(acts, dense), (ours.decode(acts), theirs.decode(dense)), (ours(x), theirs(x))]
    for a, b in pairs:
        if "dtype" in options:  # a gate within rounding of 8 bits may open in one of them alone
            assert a.dtype == b.dtype == torch.bfloat16
            assert float((a - b).float().norm()) <= 0.05 * float(b.float().norm())
        else:
            assert close(a, b, 2e-6)
    assert handle.tally.fused == {"encode": 1, "decode": 1, "forward": 1}, handle.report()


def test_rescaled_inference() -> None:
    theirs, ours = (inference_sae("TopK", rescale_acts_by_decoder_norm=True) for _ in range(2))
    handle = accelerate(ours)
    x = activations(0)
    with torch.no_grad():
        acts, dense = ours.encode(x), theirs.encode(x)
        assert close(acts, dense)
        for _ in range(2):  # decode leaves what it remembers as it is
            assert close(ours.decode(acts), theirs.decode(dense))
    assert not handle.tally.left


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda acts: acts.__setitem__((0, 3), 2.0),
    "one less": lambda acts: acts.masked_fill_(acts == acts.max(), 0),
    "through .data": lambda acts: acts.data.mul_(2),
    "through NumPy": lambda acts: acts.numpy().__setitem__((slice(None), 7), 1.0),
    "moved": lambda acts: acts.copy_(acts.roll(1, 1)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_edited_activations_are_honoured(edit: str, mode: Any) -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    with mode():
        acts = ours.encode(activations(0))
        EDITS[edit](acts)
        assert close(ours.decode(acts), theirs.decode(acts))
    assert handle.tally.left == {"decode: the activations are not encode's own, or were edited": 1}


def test_activations_are_saved_and_copied_without_their_entries(tmp_path: Path) -> None:
    sae = inference_sae("JumpReLU")
    accelerate(sae)
    with torch.no_grad():
        acts = sae.encode(activations(0))
    torch.save(acts, tmp_path / "acts.pt")
    assert torch.equal(torch.load(tmp_path / "acts.pt"), acts)  # weights_only
    assert torch.equal(copy.deepcopy(acts), acts)


@pytest.mark.parametrize("name", ["JumpReLU", "TopK"])
def test_gradients_of_inference(name: str) -> None:
    theirs, ours = inference_sae(name), inference_sae(name)
    handle = accelerate(ours)
    for use in (lambda sae, x: sae(x), lambda sae, x: sae.decode(sae.encode(x))):
        grads = []
        for sae in (theirs, ours):
            x = activations(0).requires_grad_()
            use(sae, x).pow(2).sum().backward()
            grads.append([x.grad, *(p.grad for p in sae.parameters())])
            sae.zero_grad()
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or close(b, a, 1e-5)
    assert handle.tally.fused == {"forward": 1}


def test_nan_and_a_wrong_shape_are_the_peers_own(tmp_path: Path) -> None:
    for name in ("JumpReLU", "TopK"):
        theirs, ours = inference_sae(name), inference_sae(name)
        accelerate(ours)
        x = activations(0)
        x[3, 5] = float("nan")
        with torch.no_grad():
            for call in ("encode", "forward"):
                assert torch.equal(getattr(ours, call)(x).isnan(), getattr(theirs, call)(x).isnan())
        with pytest.raises(RuntimeError):  # theirs, of a matrix product
            ours(torch.zeros(3, D_IN + 1))


def test_hooks_that_are_attached_afterwards() -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    x = activations(0)
    with torch.no_grad():
        caches = [sae.run_with_cache(x) for sae in (theirs, ours)]
        assert caches[0][1].keys() == caches[1][1].keys()
        assert len(caches[0][1]) >= 4
        for name, value in caches[0][1].items():
            assert close(caches[1][1][name], value)
        double = [("hook_sae_acts_post", lambda acts, hook: 2 * acts)]
        assert close(*[sae.run_with_hooks(x, fwd_hooks=double) for sae in (ours, theirs)])
    assert any("a hook is attached to hook_sae" in reason for reason in handle.tally.left)
    with torch.no_grad():
        ours(x)
    assert handle.tally.fused["forward"] == 1  # they are gone again


def test_transforms_of_torch_func() -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    x = activations(0)[:8]
    for transform in (lambda sae: torch.func.vmap(sae), lambda sae: torch.func.grad(lambda x: sae(x).sum())):
        assert close(transform(ours)(x), transform(theirs)(x), 1e-5)
    assert not handle.tally.fused


def test_saes_in_a_transformer() -> None:
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(n_layers=1, d_model=D_IN, n_ctx=16, d_head=16, d_vocab=50, act_fn="gelu", seed=0)
    model = sae_lens.HookedSAETransformer(config)
    sae = inference_sae("JumpReLU")
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        outputs = []
        x = model.run_with_cache(tokens)[1]["blocks.0.hook_resid_post"]
        sae.b_enc.fill_(-float((sae.process_sae_in(x) @ sae.W_enc).quantile(0.94)))
        for use_error_term in (False, True):
            model.add_sae(sae, use_error_term=use_error_term)
            theirs, their_cache = model.run_with_cache(tokens)
            handle = accelerate(model)
            outputs.append(model(tokens))
            ours, our_cache = model.run_with_cache(tokens)
            assert close(ours, theirs, 1e-5)
            assert close(outputs[-1], theirs, 1e-5)
            assert our_cache.keys() == their_cache.keys()
            assert handle.tally.fused["encode"] == handle.tally.fused["decode"] > 0
            assert any("a hook is attached" in reason for reason in handle.tally.left)
            handle.undo()


@pytest.mark.filterwarnings("ignore:Setting use_error_term")
def test_error_term() -> None:
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    for sae in (theirs, ours):
        sae.use_error_term = True
    x = activations(0)
    assert close(ours(x), theirs(x))
    assert close(ours(x), x)
    grads = [torch.autograd.grad(sae(x).sum(), sae.W_dec)[0] for sae in (ours, theirs)]
    assert close(*grads, 1e-5)
    assert handle.tally.fused["forward"] == 3


@pytest.mark.parametrize("name", ["JumpReLU", "Standard"])
def test_the_calls_of_saedashboard_go_through(name: str) -> None:
    """Its `FeatureMaskingContext` encodes with the weights of a few features in the place of all."""
    sae, ids = inference_sae(name), [3, 70, 5]
    handle = accelerate(sae)
    with torch.inference_mode():
        expected = sae.encode(activations(0))[:, ids]
    whole = dict(sae.named_parameters())
    for key, parameter in whole.items():
        if key != "b_dec":
            setattr(sae, key, torch.nn.Parameter(parameter[:, ids] if key == "W_enc" else parameter[ids]))
    with torch.inference_mode():
        assert close(sae.encode(activations(0)), expected, 1e-5)
    assert handle.tally.left == {"encode: the weights are of other sizes than cfg says": 1}
    for key, parameter in whole.items():
        setattr(sae, key, parameter)
    with torch.inference_mode():
        assert close(sae.encode(activations(0))[:, ids], expected)
    assert handle.tally.fused == {"encode": 2}


def test_the_calls_of_saebench_go_through() -> None:
    """Its core evaluation turns reshaping off, folds the decoder's norms, and calls encode, then decode."""
    theirs, ours = inference_sae("JumpReLU"), inference_sae("JumpReLU")
    handle = accelerate(ours)
    x = activations(0).reshape(4, -1, D_IN)
    results = []
    with torch.no_grad():
        for sae in (theirs, ours):
            sae.to(device="cpu", dtype=torch.float32)
            sae.turn_off_forward_pass_hook_z_reshaping()
            sae.fold_W_dec_norm()
            feature_acts = sae.encode(x)
            results.append((feature_acts, sae.decode(feature_acts), sae.W_enc.T @ sae.W_enc))
    for a, b in zip(*results, strict=True):
        assert close(b, a, 1e-5)
    assert handle.tally.fused == {"encode": 1, "decode": 1}
