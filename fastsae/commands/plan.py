"""`fastsae train --dry-run`: what the run would take, computed from its options and from the sizes of its language model."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastsae import environment
from fastsae.errors import UsageError, shown
from fastsae.flags import flag, whole_number
from fastsae.train.config import TrainConfig
from fastsae.train.hardware import HARDWARE, Hardware

if TYPE_CHECKING:  # it imports torch, for which the help does not wait
    from fastsae.train.plan import Model, Plan

RATES = {
    "flops": ("TFLOP/s", 1e12, "operations per second of a product in the number format of the run"),
    "memory_bandwidth": ("GB/s", 1e9, "rate of the memory of a process"),
    "link_bandwidth": ("GB/s", 1e9, "rate at which a process sends to another one"),
}
"""Unit, its size and meaning of the flags that say how fast the machines are."""
OWN_FLAGS = ("processes", "hardware", *RATES)
MEANINGS = {
    "rows": "activations, so that a group of processes sees the same ones",
    "reconstruction": "sums of the parts of the reconstruction",
    "penalty": "sums of the penalty and of L0 of each token",
    "norm": "norm of the gradient",
    "b_dec": "gradient of b_dec",
    "candidates": "values among which the largest of a token are chosen",
    "histogram": "counts of values, among which the largest of the batch are chosen",
    "gradients": "sums of the gradients, over processes with the same features",
}
ASSUMPTIONS = """\
Assumed: every device computes, reads and sends at its full rate, and nothing but the sum of reconstructions is hidden, with
--overlap-chunks; so real steps take longer. Left out are latency, padding, tokens that are not trained on, attention's products
of tokens with tokens, steps in which dead features learn, loading, checkpoints, the evaluation, and what Python and PyTorch
hold themselves."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the plan."""
    group = parser.add_argument_group("plan, instead of training")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="say what the run would take, and end: memory, bytes that processes send each other, operations, time",
    )
    group.add_argument(
        "--processes",
        type=whole_number,
        metavar="P",
        help="plan for so many processes [those that torchrun started, or 1]",
    )
    group.add_argument(
        "--hardware",
        choices=HARDWARE,
        help="plan for such GPUs, eight in a machine, by their data sheets (default: the device of the run, without times)",
    )
    for name, (unit, _, text) in RATES.items():
        group.add_argument(flag(name), type=_rate, metavar=unit, help=f"{text} [that of --hardware]")


def _rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1e9:  # False for NaN
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1e9, got {shown(text)}")
    return number


def check_flags(arguments: Namespace) -> None:
    """Raises UsageError where a flag of the plan has no effect because the run is to be trained."""
    given = [name for name in OWN_FLAGS if getattr(arguments, name) is not None]
    if given and not arguments.dry_run:
        raise UsageError(
            f"{flag(given[0])}: expected --dry-run beside it, which plans a run; a run itself does not use it"
        )


def run(arguments: Namespace, configs: Sequence[TrainConfig]) -> None:
    """Prints the plan; of the processes that torchrun started, the first one does."""
    from fastsae.train.pipeline import resolve_device
    from fastsae.train.plan import make_plan

    n_processes = environment.n_processes() if arguments.processes is None else arguments.processes
    hardware = _hardware(arguments)
    device_type = "cuda" if arguments.hardware else resolve_device(configs[0].device).partition(":")[0]
    configs, model = read_model(configs, device_type)
    plan = make_plan(configs, model, n_processes, device_type)
    if environment.is_first():
        print_plan(plan, hardware, device_type)


def _hardware(arguments: Namespace) -> Hardware | None:
    """The named hardware with the given rates; None where there are neither."""
    given = {name: getattr(arguments, name) * RATES[name][1] for name in RATES if getattr(arguments, name) is not None}
    if arguments.hardware is None:
        if missing := [flag(name) for name in RATES if name not in given] if given else []:
            raise UsageError(
                f"{flag(next(iter(given)))}: expected --hardware, or all of {', '.join(map(flag, RATES))}, got no {missing[0]}"
            )
        if not given:
            return None
    known = HARDWARE["h100"] if arguments.hardware is None else HARDWARE[arguments.hardware]
    if arguments.hardware is None:
        known = replace(known, memory=None)
    rates = dict[str, Any]()
    if "flops" in given:
        rates |= {"flops_16": given["flops"], "flops_32": given["flops"]}
    if "memory_bandwidth" in given:
        rates["memory_bandwidth"] = given["memory_bandwidth"]
    if "link_bandwidth" in given:
        rates |= {"link": given["link_bandwidth"], "network": given["link_bandwidth"]}
    return replace(known, **rates)


def read_model(configs: Sequence[TrainConfig], device_type: str) -> tuple[list[TrainConfig], Model]:
    """The options with the layers resolved, and the sizes of the language model, from its configuration alone.

    Raises:
        UsageError: There is no such model or layer, or not so many features.
        FastsaeError: The model's configuration cannot be read.
    """
    from fastsae.data.activations import check_layer, decoder_layers, text_config
    from fastsae.data.language_model import load_without_weights
    from fastsae.train.pipeline import check_k, model_location
    from fastsae.train.plan import Model
    from fastsae.train.validate import model_options

    common = configs[0]
    options = model_options(common.model_kwargs)
    model = load_without_weights(model_location(common.model), common.model_dtype, device_type, options=options)
    blocks, d_in = decoder_layers(model), text_config(model.config).hidden_size
    resolved = [replace(config, layer=len(blocks) // 2) if config.layer is None else config for config in configs]
    layers = [config.layer for config in resolved if config.layer is not None]
    for config, layer in zip(resolved, layers, strict=True):
        check_layer(model, layer)
        check_k(config, d_in)
    before = blocks[: max(layers) + (common.hook != "resid_pre")]
    n_before, n_weights = (sum(weight.numel() for weight in part.parameters()) for part in (before, model))
    return resolved, Model(d_in, n_before, n_weights, model.dtype.itemsize)


def print_plan(plan: Plan, hardware: Hardware | None, device_type: str) -> None:
    """Memory, work, bytes and times of a process, and which division of the features moves fewest bytes."""
    config, n = plan.config, plan.n_processes
    for sae in plan.saes:
        n_features, d_in = sae.n_features(plan.model.d_in), plan.model.d_in
        print(
            f"{n_features:,} features of {d_in:,} dimensions, {sae.architecture}, at layer {sae.layer} of {sae.model}"
        )
    if n > 1:
        n_groups = n // config.shard_features
        groups = f"{n_groups:,} group{'s' if n_groups > 1 else ''} of {config.shard_features:,}"
        divided = (
            "trains other SAEs; the figures are those of the one with most"
            if plan.is_placed
            else "trains on other tokens"
        )
        print(f"on {n:,} processes: {groups}; those of a group share the features, each group {divided}")
    print("computed, not measured\n")
    _print_memory(plan, hardware)
    _print_work(plan, hardware)
    if plan.exchanges:
        _print_exchanges(plan, hardware)
    if hardware is not None:
        seconds = plan.seconds(hardware)
        print(f"\na step of {config.batch_size:,} tokens takes {_time(seconds)}, the {config.steps:,} steps of the run "
              f"{_time(config.steps * seconds)} ({config.batch_size / seconds:,.0f} tokens per second)")  # fmt: skip
    if n > 1:
        _print_alternatives(plan, hardware, device_type)
    print(f"\n{ASSUMPTIONS}")
    if hardware is None:
        names = ", ".join(HARDWARE)
        print(f"Times: give --hardware ({names}), or {', '.join(map(flag, RATES))}.")


def _print_memory(plan: Plan, hardware: Hardware | None) -> None:
    print(f"{'memory of a process':54}{'GB':>10}")
    for need in plan.memory:
        if need.n_bytes:
            print(f"  {need.what:52}{need.n_bytes / 1e9:>10.3f}  {flag(need.option)}")
    print(f"  {'all':52}{plan.n_bytes / 1e9:>10.3f}  {_fits(plan, hardware)}")


def _fits(plan: Plan, hardware: Hardware | None) -> str:
    if hardware is None or hardware.memory is None:
        return ""
    of = f"the {hardware.memory / 1e9:.0f} GB of such a GPU"
    return f"does not fit into {of}" if plan.n_bytes > hardware.memory else f"of {of}"


def _print_work(plan: Plan, hardware: Hardware | None) -> None:
    from fastsae.train.plan import expected_l0

    found = sorted({expected_l0(sae, plan.model.d_in) for sae in plan.saes})
    l0 = " to ".join(f"{n:g}" for n in sorted({found[0], found[-1]}))
    print(f"\n{f'a step of a process, at L0 {l0}':34}{'GFLOP':>10}{'GB read, written':>20}{_titled('ms', hardware)}")
    for name in dict.fromkeys(part.name for part in plan.parts):
        parts = [part for part in plan.parts if part.name == name]
        flops, n_bytes = sum(part.flops for part in parts), sum(part.n_bytes for part in parts)
        ms = "" if hardware is None else f"{1e3 * sum(part.seconds(hardware) for part in parts):>10.2f}"
        print(f"  {name:32}{flops / 1e9:>10,.1f}{n_bytes / 1e9:>20,.3f}{ms}")


def _print_exchanges(plan: Plan, hardware: Hardware | None) -> None:
    links = "" if hardware is None else f"{'of it by network':>20}"
    print(f"\n{'a process sends in a step':34}{'MB':>10}{links}{_titled('ms', hardware)}")
    for name in dict.fromkeys(exchange.name for exchange in plan.exchanges):
        exchanges, more = [exchange for exchange in plan.exchanges if exchange.name == name], ""
        if hardware is not None:
            by_network = sum(exchange.by_link(hardware)[1] for exchange in exchanges)
            seconds = sum(exchange.seconds(hardware) for exchange in exchanges)
            more = f"{by_network / 1e6:>20,.3f}{1e3 * seconds:>10.2f}"
        n_bytes = sum(exchange.n_bytes for exchange in exchanges)
        print(f"  {name:32}{n_bytes / 1e6:>10,.3f}{more}  {MEANINGS[name]}")
    if hardware is not None and (hidden := plan.hidden(hardware)):
        print(f"  {'hidden behind the encoder':62}{-1e3 * hidden:>10.2f}")


def _print_alternatives(plan: Plan, hardware: Hardware | None, device_type: str) -> None:
    from fastsae.train.plan import alternatives

    found = alternatives(plan, device_type)
    best = min(found, key=lambda n: found[n].sent)
    fastest = min(found, key=lambda n: found[n].seconds(hardware)) if hardware else None
    print(
        f"\n{'--shard-features':18}{'MB sent in a step':>20}{'GB of memory':>15}{_titled('ms of a step', hardware, 15)}"
    )
    for n, other in found.items():
        ms = "" if hardware is None else f"{1e3 * other.seconds(hardware):>15.2f}"
        notes = ["as given"] if n == plan.config.shard_features else []
        notes += ["fewest bytes"] if n == best else []
        notes += ["least time"] if n == fastest else []
        notes += ["does not fit"] if hardware and hardware.memory and other.n_bytes > hardware.memory else []
        print(f"{n:>18,}{other.sent / 1e6:>20,.1f}{other.n_bytes / 1e9:>15.2f}{ms}  {', '.join(notes)}".rstrip())


def _titled(title: str, hardware: Hardware | None, width: int = 10) -> str:
    return "" if hardware is None else f"{title:>{width}}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.1f} {unit}"
    return f"{1e3 * seconds:.2f} ms"
