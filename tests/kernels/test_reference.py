"""The specification against closed forms written in NumPy, and against what a straight-through estimate estimates."""

from __future__ import annotations

import numpy as np
import problems
import pytest
import torch

from fastsae_kernels import AutoencodeSpec, reference


def closed_form(problem: problems.Problem) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every output and gradient of one pass, element by element from the formulas, in fp64."""
    x, W_enc, b_enc, theta, W_dec, b_dec, _ = (None if t is None else t.double().numpy() for t in problem.tensors())
    scale = np.ones(len(theta)) if problem.feature_scale is None else problem.feature_scale.double().numpy()
    g_out, g_pen = problem.grad_out.double().numpy(), problem.grad_penalty.double().numpy()[:, None]
    spec = problem.spec
    pre = x @ W_enc + b_enc
    active = pre > theta
    keep = np.ones_like(active)
    if spec.k is not None:
        # the batch is one row of its own for BatchTopK
        shape, places = ((1, -1), spec.k * len(active)) if spec.batch_topk else (active.shape, spec.k)
        rows = (pre * active).reshape(shape)
        for row, kept in zip(rows, keep.reshape(shape), strict=True):
            if (row > 0).sum() > places:
                kept[:] = np.isin(np.arange(len(row)), np.lexsort((np.arange(len(row)), -row))[:places])
    acts = pre * active * keep
    window = (np.abs(pre - theta) < spec.bandwidth / 2) * keep if spec.bandwidth else np.zeros_like(pre)
    c = spec.tanh_scale
    penalty, slope = {
        "l0": ((active & keep).astype(float), np.zeros_like(acts)),
        "l1": (acts * scale, np.ones_like(acts)),
        "tanh": (np.tanh(c * acts * scale), c / np.cosh(c * acts * scale) ** 2),
    }[spec.penalty]
    g_acts = g_out @ W_dec.T + g_pen * slope * scale
    estimate = theta * g_acts + (g_pen if spec.penalty == "l0" else 0)
    estimate = window * estimate / (spec.bandwidth or 1)
    g_pre = active * keep * g_acts + (estimate if spec.ste_to_input else 0)
    outputs = {"sae_out": acts @ W_dec + b_dec, "penalty": penalty.sum(1)}
    grads = {
        "x": g_pre @ W_enc.T,
        "W_enc": x.T @ g_pre,
        "b_enc": g_pre.sum(0),
        "threshold": -estimate.sum(0),
        "W_dec": acts.T @ g_out,
        "b_dec": g_out.sum(0),
    }
    if problem.feature_scale is not None:
        grads["feature_scale"] = (g_pen * slope * acts).sum(0)
    return outputs, grads


@pytest.mark.parametrize("spec", problems.SPECS.values(), ids=problems.SPECS)
@pytest.mark.parametrize("edges", [False, True], ids=["random", "on the edges"])
def test_reference_matches_the_closed_form(spec: AutoencodeSpec, edges: bool) -> None:
    with_scale = spec.penalty != "l0"
    problem = problems.on_the_edges(spec) if edges else problems.make(spec=spec, with_scale=with_scale)
    got = problems.run_reference(problem.to(torch.float64))
    outputs, grads = closed_form(problem)
    for name, expected in outputs.items():
        np.testing.assert_allclose(got.outputs[name].numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=name)
    for name, expected in grads.items():
        np.testing.assert_allclose(got.grads[name].numpy(), expected, rtol=1e-11, atol=1e-11, err_msg=name)


def test_gate_is_strict_and_window_is_open_at_both_ends() -> None:
    pre = torch.tensor([[0.5, 1.0, 1.5, 2.0, 2.5, 0.4999, 1.0001]], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((7,), 1.5, dtype=torch.float64, requires_grad=True)
    acts = reference.JumpReLU.apply(pre, threshold, 1.0, False)
    assert acts.tolist() == [[0, 0, 0, 2.0, 2.5, 0, 0]]
    acts.sum().backward()
    # 1.0 and 2.0 lie exactly on the edges of the window around 1.5 and are outside of it
    assert threshold.grad is not None
    assert threshold.grad.tolist() == [0, 0, -1.5, 0, 0, 0, -1.5]


def test_inactive_half_of_the_window_moves_the_threshold() -> None:
    pre = torch.tensor([[0.9]], dtype=torch.float64)
    threshold = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    reference.Step.apply(pre, threshold, 0.5, False).sum().backward()
    assert threshold.grad is not None
    assert threshold.grad.item() == -2.0


def test_log_threshold_gets_the_chain_rule_factor() -> None:
    pre = torch.tensor([[2.1, 1.9, 5.0]], dtype=torch.float64)
    log_threshold = torch.full((3,), 2.0, dtype=torch.float64).log().requires_grad_()
    reference.JumpReLU.apply(pre, log_threshold.exp(), 0.5, False).sum().backward()
    assert log_threshold.grad is not None
    torch.testing.assert_close(log_threshold.grad, torch.tensor([-8.0, -8.0, 0.0], dtype=torch.float64))


def test_estimate_approaches_the_slope_of_the_expected_loss() -> None:
    """With smooth random pre-activations, d E[act] / d theta = -theta p(theta) and d E[step] / d theta = -p(theta)."""
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(400_000, 1, dtype=torch.float64, generator=g)
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    density = float(torch.distributions.Normal(0, 1).log_prob(torch.tensor(0.7)).exp())
    for function, expected in ((reference.JumpReLU, -0.7 * density), (reference.Step, -density)):
        (slope,) = torch.autograd.grad(function.apply(pre, threshold, 0.2, False).mean(), threshold)
        assert slope.item() == pytest.approx(expected, rel=0.02)


def test_nan_in_the_input_reaches_the_reconstruction() -> None:
    problem = problems.make()
    problem.x[3, 2] = float("nan")
    out = reference.autoencode(*problem.tensors(), problem.spec).sae_out  # type: ignore[arg-type]
    assert out[3].isnan().all()
    assert out[[0, 1, 2, *range(4, 37)]].isfinite().all()


def test_topk_ties_go_to_the_lower_index() -> None:
    acts = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert reference.topk_keep(acts, 2).tolist() == [[False, True, True, False, False]]
    assert reference.topk_keep(acts, 4).all()
