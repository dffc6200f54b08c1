"""The pre-activation loss beside compiled code; its numbers are SAELens' (tests/sae/test_saelens.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae_kernels.pre_act import pre_act_loss


def test_compiled_code_calls_it_as_eager_code_does() -> None:
    g = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (torch.randn(shape, generator=g, requires_grad=True) for shape in ((9, 5), (5, 30), (30,)))
    threshold, norms = torch.rand(30, generator=g), torch.rand(30, generator=g)

    def loss(dead_mask: Tensor) -> Tensor:
        return 2 * pre_act_loss(x * 3, W_enc, b_enc, threshold, norms, dead_mask)

    compiled = torch.compile(loss, backend="aot_eager")
    for n_dead in (30, 7, 0, 8):  # their number changes from call to call
        dead_mask = torch.arange(30) < n_dead
        results = []
        for function in (loss, compiled):
            value = function(dead_mask)
            grads = torch.autograd.grad(value, (x, W_enc, b_enc)) if n_dead else ()
            results.append((value.detach(), *grads))
        torch.testing.assert_close(*results)
