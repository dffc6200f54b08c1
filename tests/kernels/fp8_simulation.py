"""How often an fp8 candidate is missed, and how many candidates there are: a simulation with PyTorch's own float8, dense.

    PYTHONPATH=. python tests/kernels/fp8_simulation.py

For every pair of a token and a feature it finds the least `sigmas` that makes the pair a candidate, so that one run answers
for every margin; "worst" is the bound that never misses. The sums of the fp8 products are exact here; `--accumulate` also
cuts them to 13 bits as the tensor cores of Ada and Hopper do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SIGMAS = (3, 4, 5, 6, 7)
# share of the features that are active: 64 of 16,384 to 64 of 65,536 are 0.4 to 0.1 %
DENSITY = 0.004


class Rounded(NamedTuple):
    """Rows in e4m3 with a power of two as scale each."""

    before: Tensor  # [R, D] fp32
    values: Tensor  # [R, D] fp32: the rounded rows, scaled back
    scale: Tensor  # [R, 1]

    def norms(self, weights: Tensor) -> Tensor:
        """Norms weighted by `[D]`, before or after rounding, whichever is larger."""
        return torch.maximum(self._norm(self.before, weights), self._norm(self.values, weights))

    def errors(self, weights: Tensor) -> Tensor:
        """Weighted norms of what rounding changed."""
        return self._norm(self.before - self.values, weights)

    def _norm(self, rows: Tensor, weights: Tensor) -> Tensor:
        return ((rows / self.scale).square() @ weights).sqrt() * self.scale[:, 0]


def rounded(matrix: Tensor) -> Rounded:
    """Rows to float8_e4m3fn and back; the largest of a row lands in [128, 256)."""
    matrix = matrix.float()
    _, exponent = torch.frexp(matrix.abs().amax(1, keepdim=True))
    scale = torch.ldexp(torch.ones_like(matrix[:, :1]), exponent.clamp_min(-118) - 8)
    return Rounded(matrix, (matrix / scale).to(torch.float8_e4m3fn).float() * scale, scale)


def truncated_product(x: Tensor, W: Tensor, partial: int = 128) -> Tensor:
    """`x @ W.T` summed as the tensor cores do: 32 products and the sum so far, cut 13 bits below the largest of them."""
    total = torch.zeros(x.shape[0], W.shape[0])
    for first in range(0, x.shape[1], partial):
        acc = torch.zeros_like(total)
        for start in range(first, min(first + partial, x.shape[1]), 32):
            terms = torch.cat((x[:, None, start : start + 32] * W[None, :, start : start + 32], acc[..., None]), -1)
            _, exponent = torch.frexp(terms.abs().amax(-1, keepdim=True))
            unit = torch.ldexp(torch.ones_like(terms[..., :1]), exponent - 14)
            acc = ((terms / unit).trunc() * unit).sum(-1)
        total += acc
    return total


def unit_margin(x: Rounded, W: Rounded, spread: Tensor | None) -> Tensor:
    """`[N, S]`: the margin of one standard deviation, or the bound where there is no spread."""
    from fastsae_kernels.gpu import fp8

    one = torch.ones_like(x.before[0])
    weights = one if spread is None else spread
    accumulation = fp8.WORST_ACCUMULATION if spread is None else fp8.TYPICAL_ACCUMULATION
    margin = x.errors(one)[:, None] * W.norms(weights)
    margin += x.norms(one)[:, None] * (W.errors(weights) + accumulation * W.norms(weights))
    if spread is None:
        return margin
    squares = (x.before / x.scale).square()
    wide = (squares.square() / spread).sum(1) / squares.sum(1).square() / 3
    return wide.clamp_min(1).sqrt()[:, None] * margin


class Problem(NamedTuple):
    """Tokens, features by rows, and their thresholds."""

    x: Tensor  # [N, D]
    W: Tensor  # [S, D]

    def outcome(self, truncate: bool = False) -> Outcome:
        """Threshold by threshold of features that are active on a share of `DENSITY` of the tokens."""
        from fastsae_kernels.gpu.fp8_quantise import dimension_spread

        exact = self.x @ self.W.T
        x, W = rounded(self.x), rounded(self.W)
        approximate = truncated_product(x.values, W.values) if truncate else x.values @ W.values.T
        threshold = exact.kthvalue(round(len(exact) * (1 - DENSITY)), dim=0).values
        unit = unit_margin(x, W, dimension_spread(self.x))
        return Outcome(
            exact > threshold,
            (threshold - approximate) / unit,
            (approximate - exact) / unit,
            threshold - approximate < unit_margin(x, W, None),
        )


Maker = Callable[[int, int, int], Problem]


class Outcome(NamedTuple):
    """Of every pair, `[N, S]`."""

    active: Tensor
    needed: Tensor  # least sigmas that make it a candidate
    error: Tensor  # of its product, in sigmas
    worst: Tensor  # whether the bound makes it a candidate


def gaussian(n_tokens: int, d_sae: int, d_in: int) -> Problem:
    """Independent and identical dimensions."""
    return Problem(torch.randn(n_tokens, d_in), torch.randn(d_sae, d_in) / d_in**0.5)


def outliers(n_tokens: int, d_sae: int, d_in: int) -> Problem:
    """Three dimensions a hundred times as large as the others, one in a hundred ten times; features do not know of them."""
    spread = torch.ones(d_in)
    spread[: d_in // 100], spread[:3] = 10, 100
    return Problem(torch.randn(n_tokens, d_in) * spread, torch.randn(d_sae, d_in) / d_in**0.5)


def from_tokens(x: Tensor, d_sae: int) -> Problem:
    """Centred tokens as directions: features point where the tokens do, outlier dimensions included."""
    x = x.float() - x.float().mean(0)
    W, x = x[:d_sae], x[d_sae:]
    return Problem(x, W / W.norm(dim=1, keepdim=True))


def aligned(n_tokens: int, d_sae: int, d_in: int) -> Problem:
    """The outliers again, with features that point at such tokens: most of either norm lies in three dimensions."""
    return from_tokens(outliers(n_tokens + d_sae, 1, d_in).x, d_sae)


def demo_model(n_tokens: int, d_sae: int, d_in: int) -> Problem:
    """Residual stream of the embedded model's third block, first tokens left out; features are tokens as above."""
    from fastsae.data import demo
    from fastsae.data.activations import ResidualStream
    from fastsae.data.buffer import activation_stream
    from fastsae.data.language_model import load_model
    from fastsae.data.sequencing import FastSequencer

    model, tokenizer = load_model(str(demo.model_path()))
    dialogues = demo.load_dialogues()
    stream = activation_stream(
        ResidualStream(model, 3), FastSequencer(dialogues, list(range(400)), tokenizer, endless=False), False
    )
    found: list[Tensor] = []
    while sum(map(len, found)) < n_tokens + d_sae:
        batch = next(stream)
        found.append(batch.acts[batch.positions > 0])
    x = torch.cat(found)[: n_tokens + d_sae]
    return from_tokens(x[torch.randperm(len(x))], d_sae)


def single(n_tokens: int, d_sae: int, d_in: int) -> Problem:
    """Heavy tails and features of one dimension each: where the model fails."""
    x = torch.distributions.StudentT(3.0).sample(torch.Size((n_tokens, d_in)))
    return Problem(x, torch.eye(d_in)[torch.arange(d_sae) % d_in])


def sinks(n_tokens: int, d_sae: int, d_in: int) -> Problem:
    """One dimension is huge on one token in a hundred, another large on all; features as in `from_tokens`."""
    x = torch.randn(n_tokens + d_sae, d_in)
    x[torch.rand(len(x)) < 0.01, 0] += 200.0
    x[:, 1] *= 30
    return from_tokens(x, d_sae)


def report(name: str, problem: Problem, truncate: bool) -> str:
    """One line: spread of the error, the margin that the worst active pair needs, misses and candidates per active pair."""
    active, needed, error, worst = problem.outcome(truncate)
    n_active = int(active.sum())
    assert not (active & ~worst).any(), "the bound missed"
    missed = [f"{float((active & (needed >= s)).sum()) / n_active:9.1e}" for s in SIGMAS]
    candidates = [f"{float((needed < s).sum()) / n_active:6.2f}" for s in SIGMAS]
    return (
        f"{name:16} {n_active:8} {float(error.std()):5.2f} {float(error.abs().max()):6.1f} "
        f"{float(needed[active].max()):6.1f}  {' '.join(missed)}  {' '.join(candidates)}  {float(worst.sum()) / n_active:6.2f}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--accumulate", action="store_true", help="cut sums to 13 bits; use few tokens and features")
    parser.add_argument("--d-in", type=int, nargs="+", default=[768, 2304, 4096])
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    problems: list[tuple[Maker, int]] = [
        (make, d_in) for make in (gaussian, outliers, aligned, sinks, single) for d_in in arguments.d_in
    ]
    if not arguments.accumulate:
        problems.append((demo_model, 256))
    head = " ".join(f"miss at {s}" for s in SIGMAS) + "   cand. at " + "   at ".join(map(str, SIGMAS)) + " worst"
    sys.stdout.write(f"{'problem':16}   active   std    max   need  {head}\n")
    for make, d_in in problems:
        problem = make(arguments.tokens, arguments.features, d_in)
        sys.stdout.write(report(f"{make.__name__} {d_in}", problem, arguments.accumulate) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
