"""What a plan trains: one option apart from the FAST method in each arm, and streams that arms share."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from fastsae.comparison.arms import ARMS, DEFAULT_ARMS, Plan, chosen, sae_name
from fastsae.errors import UsageError


def plan(*arms: str, seeds: tuple[int, ...] = (0, 1), text: str | None = "demo", **options: Any) -> Plan:
    return Plan(chosen(arms or DEFAULT_ARMS), seeds, options, text)


def test_arms_with_the_same_tokens_share_a_stream() -> None:
    streams = plan().streams()
    assert {name: len(saes) for name, saes in streams.items()} == {
        "fast": 6, "bt-f": 2, "bt-p": 2, "packed": 2, "random-model": 2
    }  # fmt: skip
    assert set(streams["fast"]) == {
        sae_name(arm, seed) for arm in ("fast", "frozen-decoder", "frozen-encoder") for seed in (0, 1)
    }


@pytest.mark.parametrize("arm", [name for name in ARMS if name not in ("fast", "fast-paper")])
def test_an_arm_differs_in_what_it_names_alone(arm: str) -> None:
    chosen_plan = plan("fast", arm, lr=1e-3)
    fast, other = (asdict(chosen_plan.config(name, 1)) for name in ("fast", arm))
    expected = {**ARMS[arm].options, **({"text": "demo"} if ARMS[arm].needs_text else {})}
    assert {name: other[name] for name in fast if fast[name] != other[name]} == expected


def test_seeds_draw_weights_and_leave_the_order_of_the_tokens() -> None:
    configs = [config for saes in plan(seeds=(3, 5)).streams().values() for config in saes.values()]
    assert {config.seed for config in configs} == {3, 5}
    assert {config.data_seed for config in configs} == {3}


def test_the_published_recipe_keeps_the_budget_and_has_a_stream_of_its_own() -> None:
    streams = plan("fast", "fast-paper", tokens=100_000).streams()
    assert set(streams) == {"fast", "fast-paper"}
    config = streams["fast-paper"][sae_name("fast-paper", 0)]
    assert config.tokens == 100_000
    assert config.batch_size == 128
    assert not config.controls_l0


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (("fast",), {}, "--arms: expected fast and others"),
        (("bt-f", "packed"), {}, "--arms: expected fast and others"),
        (("fast", "slow"), {}, "got 'slow'"),
        (("fast", "bt-f", "bt-f"), {}, "--arms: expected different values"),
        (("fast", "bt-f"), {"seeds": (1, 1)}, "--seeds: expected different values"),
        (("fast", "bt-f"), {"seeds": ()}, "--seeds: expected different values, got none"),
        (("fast", "bt-p"), {"text": None}, "--text: expected plain text.*--arms fast$"),
        (("fast", "bt-f"), {"frozen": "encoder"}, "frozen: expected none"),
    ],
)
def test_plans_that_make_no_sense(arms: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(*arms, **options)
