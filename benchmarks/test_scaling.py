"""How the time of a step's forward and backward grows with the number of features, and with how many of them are active."""

from __future__ import annotations

from functools import partial

from benchmarks.floor import step_work
from benchmarks.harness import Case, cases_and_providers
from benchmarks.shapes import DEVICE, Shape
from benchmarks.test_train_step import provider

N_TOKENS = {"cpu": 256, "cuda": 8192}[DEVICE]
D_SAE = [4096, 8192, 16384, 32768, 65536]  # at L0 64
L0 = [8, 32, 128, 512, 1024, 1536, 3072]  # of 16,384; the fused ops take the dense path from an eighth on
SHAPES = {
    "scaling with d_sae": {d_sae: Shape(N_TOKENS, 768, d_sae, 64) for d_sae in D_SAE},
    "scaling with L0": {l0: Shape(N_TOKENS, 768, 16384, l0) for l0 in L0},
}
CASES = [
    Case(
        operation,
        f"{value:,}",
        shape,
        {name: provider(name, shape) for name in ("dense eager fp32", "fused fp32")},
        work=partial(step_work, shape),
        x=value,
    )
    for operation, shapes in SHAPES.items()
    for value, shape in shapes.items()
]


@cases_and_providers(CASES)
def test_scaling(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
