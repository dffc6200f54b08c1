"""A TopK SAE's training step: ours against the dense step and the three peers, whose default it is."""

from __future__ import annotations

from functools import partial

from benchmarks.floor import step_work
from benchmarks.harness import Case, cases_and_providers
from benchmarks.peers import Action, our_provider, peer_providers
from benchmarks.shapes import DEVICE, SHAPES

TOPK_SHAPES = {"cpu": ("demo", "pythia-70m"), "cuda": ("gpt2-small x32", "gemma-2-2b 16k")}[DEVICE]
ACTIONS: dict[str, Action] = {"forward+backward, TopK": "loss_and_backward", "whole step, TopK": "train_step"}


def case(operation: str, shape_name: str) -> Case:
    shape, action = SHAPES[shape_name], ACTIONS[operation]
    peers = peer_providers(shape, "topk", action)
    work = partial(step_work, shape, adam="step" in action)
    return Case(operation, shape_name, shape, peers | {"fused fp32": our_provider(shape, "topk", action)}, work=work)


CASES = [case("whole step, TopK", shape_name) for shape_name in TOPK_SHAPES]
CASES += [case("forward+backward, TopK", TOPK_SHAPES[0])]


@cases_and_providers(CASES)
def test_topk_step(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
