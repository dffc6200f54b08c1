"""The arms of a comparison: in what each differs from the FAST method, and which of them share a stream of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastsae.errors import UsageError
from fastsae.train.config import TrainConfig
from fastsae.train.grid import OF_ONE_SAE, with_one_order
from fastsae.train.presets import PRESETS


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        meaning: What it does, in a few words.
        options: What it changes.
        needs_text: Whether it trains on plain text.
    """

    meaning: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_text: bool = False


_PAPER = {name: value for name, value in PRESETS["fast-paper"].items() if name != "tokens"}
ARMS: dict[str, Arm] = {
    "fast": Arm("each dialogue alone (the FAST method)"),
    "bt-f": Arm("the same dialogues, concatenated and cut into blocks", {"sequencing": "block"}),
    "bt-p": Arm("plain text in blocks", {"sequencing": "block"}, needs_text=True),
    "packed": Arm("several dialogues in a row, which do not see each other", {"sequencing": "packed"}),
    "frozen-decoder": Arm("control: FAST, but the decoder stays random", {"frozen": "decoder"}),
    "frozen-encoder": Arm("control: FAST, but the encoder stays random", {"frozen": "encoder"}),
    "random-model": Arm("control: FAST on a language model with random weights", {"random_model": True}),
    "fast-paper": Arm("FAST by the published recipe, whose L0 is not controlled", _PAPER),
}
DEFAULT_ARMS = ("fast", "bt-f", "bt-p", "packed", "frozen-decoder", "frozen-encoder", "random-model")
REFERENCE = "fast"  # what the others are compared with
CONTROLS = ("frozen-decoder", "frozen-encoder", "random-model")
DECIDED_BY_ARMS = ("sequencing", "frozen", "random_model")


def sae_name(arm: str, seed: int) -> str:
    """The name of the SAE of an arm and a seed, and of its folder."""
    return f"{arm}-seed-{seed}"


@dataclass(frozen=True)
class Plan:
    """What a comparison trains.

    Attributes:
        arms: Names of arms, in the order of the tables.
        seeds: Each arm trains an SAE for each of them. A seed draws the SAE's weights; the tokens and their order are the
            same for all.
        options: Options that all arms share.
        text: Plain text for the arms that need it.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any]
    text: str | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise UsageError(f"--arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
        for option, values in (("--arms", self.arms), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{option}: expected different values, got {', '.join(map(str, values)) or 'none'}")
        if REFERENCE not in self.arms or len(self.arms) < 2:
            raise UsageError(f"--arms: expected {REFERENCE} and others to compare it with, got {', '.join(self.arms)}")
        if given := [name for name in DECIDED_BY_ARMS if name in self.options]:
            raise UsageError(f"{given[0]}: expected none, because the arms of a comparison differ in it")
        if self.text is None and (missing := [name for name in self.arms if ARMS[name].needs_text]):
            others = ",".join(name for name in self.arms if name not in missing)
            raise UsageError(
                f"--text: expected plain text, on which the arm {missing[0]} trains, got none; name a file, a folder or a "
                f"dataset on the hub, or leave the arm out: --arms {others}"
            )

    def streams(self) -> dict[str, dict[str, TrainConfig]]:
        """The SAEs by name, for each stream of activations; a stream has the name of its first arm."""
        found: dict[str, dict[str, TrainConfig]] = {}
        for arm in self.arms:
            configs = {sae_name(arm, seed): self.config(arm, seed) for seed in self.seeds}
            shared = _of_the_stream(next(iter(configs.values())))
            same = (name for name, saes in found.items() if _of_the_stream(next(iter(saes.values()))) == shared)
            found.setdefault(next(same, arm), {}).update(configs)
        return {name: with_one_order(saes) for name, saes in found.items()}

    def config(self, arm: str, seed: int) -> TrainConfig:
        """The options of one SAE."""
        own = {**self.options, **ARMS[arm].options, "seed": seed, "data_seed": self.seeds[0]}
        return TrainConfig(**own, text=self.text if ARMS[arm].needs_text else None)


def _of_the_stream(config: TrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_ONE_SAE}


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The arms in the order of `ARMS`, the reference first; unknown names at the end, where `Plan` refuses them."""
    return tuple(sorted(names, key=lambda name: list(ARMS).index(name) if name in ARMS else len(ARMS)))
