"""How the time of a step's forward and backward grows with the number of features, and with how many of them are active."""

from __future__ import annotations

import pytest

from benchmarks.shapes import Shape, parameters, tokens
from benchmarks.test_train_step import dense, fused, step

D_SAE = [4096, 8192, 16384, 32768, 65536, 131072]  # at L0 64
L0 = [8, 32, 128, 512, 1024, 1536, 2048, 4096]  # of 16,384; the fused ops take the dense path from a tenth on
SHAPES = {
    "scaling with d_sae": {d_sae: Shape(512, 768, d_sae, 64) for d_sae in D_SAE},
    "scaling with L0": {l0: Shape(512, 768, 16384, l0) for l0 in L0},
}
PROVIDERS = {"dense eager fp32": dense, "fused fp32": fused}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("group", "value"), [(group, value) for group, shapes in SHAPES.items() for value in shapes])
def test_scaling(benchmark, group: str, value: int, provider: str) -> None:  # type: ignore[no-untyped-def]
    shape = SHAPES[group][value]
    x, p = tokens(shape), parameters(shape)
    if provider != "dense eager fp32":
        exact, got = step(dense, x, p), step(fused, x, p)
        worst = max(((got[name] - grad).norm() / grad.norm()).item() for name, grad in exact.items())
        assert worst < 0.05, f"{worst}: more than features that flip at their threshold"
    benchmark.group = f"{group}, {value:,}"
    benchmark.extra_info.update(provider=provider, baseline="dense eager fp32", error=None, x=value)
    benchmark.pedantic(step, args=(PROVIDERS[provider], x, p), rounds=3, warmup_rounds=1)
