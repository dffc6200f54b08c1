"""A bias before the encoder: the gradient by a matrix-vector product is that of autograd, and asks for no gradient of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from problems import assert_within_budget, leaves
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec, cpu, reference

SPECS = {name: problems.SPECS[name] for name in ("l0", "ste to input", "l1", "top-3")}


def gradients(problem: problems.Problem, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    inputs = leaves(problem)[:6]
    pre_bias = torch.linspace(-1, 1, problem.x.shape[1], dtype=problem.x.dtype).requires_grad_()
    loss(pre_bias, *inputs).backward()
    named = {name: leaf.grad for name, leaf in zip(problems.NAMES, inputs, strict=False) if leaf is not None}
    return {"pre_bias": pre_bias.grad, **named}  # type: ignore[dict-item]


def dense(spec: AutoencodeSpec) -> Callable[..., Tensor]:
    def loss(pre_bias: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        output = reference.autoencode(x - pre_bias, *others, None, spec)
        return output.sae_out.square().sum() + output.penalty.sum()

    return loss


def fused(spec: AutoencodeSpec) -> Callable[..., Tensor]:
    def loss(pre_bias: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, *others: Tensor) -> Tensor:
        x, b_enc = kernels.subtract_pre_bias(x, pre_bias, W_enc, b_enc)
        output = kernels.autoencode(x, W_enc, b_enc, *others, spec=spec)
        return output.sae_out.square().sum() + output.penalty.sum()

    return loss


@pytest.mark.parametrize("whole_graph", [False, True], ids=["eager", "whole graph"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_gradient_is_that_of_the_reference(spec: AutoencodeSpec, whole_graph: bool) -> None:
    problem = problems.make(d_sae=300, spec=spec)
    truth, eager = gradients(problem.to(torch.float64), dense(spec)), gradients(problem, dense(spec))
    torch._dynamo.reset()
    loss = torch.compile(fused(spec), fullgraph=True, backend="aot_eager") if whole_graph else fused(spec)
    for name, grad in gradients(problem, loss).items():
        assert_within_budget(name, grad.double(), truth[name], eager[name].double())


def test_the_op_is_not_asked_for_the_gradient_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    backward = cpu.backward

    def spy(*inputs: Any) -> Any:
        asked.append(inputs[4].x)
        return backward(*inputs)

    monkeypatch.setattr(cpu, "backward", spy)
    problem = problems.make(d_sae=300, density=0.02)
    inputs = leaves(problem)[1:6]
    fused(problem.spec)(torch.zeros(24).requires_grad_(), problem.x, *inputs).backward()
    assert asked == [False]
