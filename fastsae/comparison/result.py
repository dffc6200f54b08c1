"""The layout of `compare.json`, in one place."""

from __future__ import annotations

from typing import Any, TypedDict


class Value(TypedDict):
    """A metric of one arm: the mean over its seeds, its interval over dialogues (None: too few), and the value of each seed."""

    value: float
    low: float | None
    high: float | None
    seeds: list[float]


Values = dict[str, dict[str, dict[str, Value | None]]]
"""Class of tokens to metric to arm to value; None where the metric is undefined. `fastsae.comparison.metrics` defines classes and
metrics. `values["features"]["dead_share"]` has the dead features, with Wilson's interval."""

# `class` is a keyword, so this one is written as a call
Difference = TypedDict(
    "Difference",
    {
        "class": str,
        "metric": str,
        "arm": str,
        "reference": str,
        "difference": float,  # arm minus reference, of the means over seeds
        "low": float | None,  # paired bootstrap interval over dialogues
        "high": float | None,
        "seeds": list[float],  # the arm's value for each seed, and the reference's
        "reference_seeds": list[float],
        "p": float | None,  # sign-flip test over dialogues; None where it was not tested
        "p_holm": float | None,  # the same after Holm over all differences that were tested
        "verdict": str | None,  # "lower", "higher", "no difference shown"; None where it was not to be tested
        "reason": str,  # why no difference is shown
        "standard_error": float | None,  # over dialogues
        "detectable": float | None,  # smallest difference found with 80 % power at Holm's first step
    },
)


class Run(TypedDict):
    """One SAE of an arm."""

    seed: int
    training_tokens: int
    l0_own_data: float | None  # at the end of training, on what the arm trained on
    seconds: float
    saebench: dict[str, dict[str, float | None]]  # SAEBench's groups and names, see `sums.saebench_metrics`


class Arm(TypedDict):
    """One way to train."""

    name: str
    description: str  # how the activations and the SAE are made, in one sentence
    is_control: bool
    is_another_model: bool  # the activations are another model's, so that their scale cannot be compared
    target_l0: float | None  # None where the arm's recipe sets none, as the paper's does
    runs: list[Run]  # those that ended well, one for each seed
    error: str | None  # why the others are missing


class LeakagePoint(TypedDict):
    """How far the gradient that a token gives W_dec in a context is from that of the same token in its dialogue alone."""

    context: str  # "block", or "packed" for the masked pack, the control
    distance: float  # tokens of its own dialogue before it in the context, the middle of a bin
    leak: float  # median over tokens of ||g_context - g_alone||^2 / ||g_alone||^2
    low: float | None  # quartiles
    high: float | None
    tokens: int


class GsnrRow(TypedDict):
    """The gradient's signal-to-noise ratio of one group of parameters of one arm."""

    arm: str
    group: str  # W_enc, W_dec, b_enc, threshold
    features: str  # "live" or "dead", or "all" of parameters that belong to no feature
    unit: str  # "token" or "dialogue"
    median: float | None  # over parameters, as are the quartiles
    low: float | None
    high: float | None
    pooled: float | None  # ||E g||^2 / tr Cov g


class HeldOut(TypedDict):
    """The data that every arm is measured on."""

    dialogues: int
    tokens: int
    sinks: int


class Result(TypedDict):
    """`compare.json`."""

    model: str
    layer: int
    dataset: str
    text_dataset: str | None  # plain text of the arm `bt-p`
    d_in: int
    d_sae: int
    architecture: str
    seeds: list[int]
    held_out: HeldOut
    arms: list[Arm]
    values: Values
    differences: list[Difference]
    leakage: list[LeakagePoint]  # empty where it was not measured
    gsnr: list[GsnrRow]  # empty where it was not measured
    warnings: list[str]
    config: dict[str, Any]  # the resolved options
    seconds: float
    version: str
