"""What `accelerate` did to objects, what they did since, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.distributed import Groups, Sharding
from fastsae.errors import UsageError
from fastsae_kernels import ActivityHint, Collector
from fastsae_kernels.memory import Spare

STATE = "_fastsae"  # the attribute of an accelerated object that holds its `State`


@dataclass(frozen=True)
class Options:
    """The options of `accelerate`."""

    optimizer: bool = False
    layout: bool = True
    fix_auxk: bool = False
    mesh: Groups | None = None


class Tally:
    """How many calls took the fused ops, how many the peer's own code and why, and rows whose gradients differ."""

    def __init__(self) -> None:
        self.fused: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self._rows: dict[str, Tensor] = {}

    def count(self, method: str, reason: str | None) -> None:
        """Counts one call of a method, which was left to the peer for a reason, or for none was not."""
        if reason is None:
            self.fused[method] += 1
        else:
            self.left[f"{method}: {reason}"] += 1

    def count_rows(self, what: str, rows: Tensor) -> None:
        """Adds a number of rows, a 0-d tensor that stays on its device: reading it would wait for a GPU."""
        before = self._rows.get(what)
        self._rows[what] = rows if before is None else before.to(rows.device) + rows

    def rows(self) -> dict[str, int]:
        """The numbers of rows that are above 0."""
        return {what: int(rows) for what, rows in self._rows.items() if int(rows) > 0}


@dataclass
class State:
    """What an accelerated object remembers between calls."""

    tally: Tally
    options: Options
    activity: ActivityHint = field(default_factory=ActivityHint)
    dead_activity: ActivityHint = field(default_factory=ActivityHint)  # of the auxiliary loss
    collector: Collector = field(default_factory=Collector)  # of weight gradients, for `FusedSAEAdam`
    spare: Spare = field(default_factory=Spare)  # the memory of the last dense activations, once they are gone
    in_peer: bool = False  # inside of a call that was left to the peer
    sharding: Sharding | None = None  # which features of the SAE this process holds, where several share them
    has_compared: bool = False  # the tokens of a step with those of the others


class Accelerated:
    """What the fast classes of all peers share: each call decides whether the fused ops or the peer's own code runs.

    It stands behind a peer's class among the bases, whose memory layout a class must have that is to be swapped with it.
    """

    _fastsae: State

    def _is_fused(self, method: str, reason: str | None) -> bool:
        """Whether a call takes the fused ops, which is the case without a reason against it; counts it."""
        if self._fastsae.in_peer:  # a part of a call that is counted already
            return False
        self._fastsae.tally.count(method, reason)
        return reason is None

    def _by_peer(self, method: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Runs a method of the peer, whose own calls then stay with the peer."""
        state = self._fastsae
        before, state.in_peer = state.in_peer, True
        try:
            return method(*arguments, **keywords)
        finally:
            state.in_peer = before


class Handle:
    """What `accelerate` changed, with a report of what happened since and the way back.

    Args:
        accelerated: What to use from now on: the object itself, or for a class its fast subclass.
        options: Those of `accelerate`.
    """

    def __init__(self, accelerated: Any, options: Options) -> None:
        self.accelerated, self.options = accelerated, options
        self.tally = Tally()
        self.changes: list[str] = []  # what was done, a line each
        self.left_alone: list[str] = []  # objects of unknown classes, by name
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Gives every object its class, storage and optimiser back; the second time there is nothing left to do."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # the other processes, which may not know of an error here, would be waited for
        if kind is None or self.options.mesh is None:
            self.undo()

    def __repr__(self) -> str:
        fused, left = self.tally.fused.total(), self.tally.left.total()
        named = f", {len(self.left_alone)} left alone" if self.left_alone else ""
        return f"<fastsae.accelerate: {len(self.changes)} accelerated{named}; {fused} calls fused, {left} left to the peer>"

    def report(self) -> str:
        """A table of what was changed, which calls took the fused ops, and which did not and why."""
        parts: list[tuple[str, Mapping[str, int | str]]] = [
            ("accelerated", dict.fromkeys(self.changes, "")),
            ("left alone", dict.fromkeys(self.left_alone, "")),
            ("calls on the fused ops", dict(self.tally.fused.most_common())),
            ("calls left to the peer", dict(self.tally.left.most_common())),
            ("rows with other gradients than the peer's", self.tally.rows()),
        ]
        lines = []
        for title, entries in parts:
            if entries:
                lines += [
                    title,
                    *(f"  {count:>9}  {name}" if count else f"  {name}" for name, count in entries.items()),
                ]
        return "\n".join(lines)

    def swap(self, obj: Any, cls: type) -> None:
        """Gives an object a fast class."""
        before = type(obj)
        obj.__dict__[STATE] = State(self.tally, self.options)
        obj.__class__ = cls

        def undo() -> None:
            if type(obj) is cls:
                obj.__class__ = before
            obj.__dict__.pop(STATE, None)

        self._undo.append(undo)

    def replace(self, place: Any, key: str, value: Any) -> None:
        """Puts a value into a dict or an attribute of a module."""
        names = place if isinstance(place, dict) else vars(place)
        before = names[key]
        names[key] = value

        def undo() -> None:
            if names.get(key) is value:
                names[key] = before

        self._undo.append(undo)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Adds a step to `undo`, whose steps run from the last to the first."""
        self._undo.append(action)

    def store_transposed(self, module: nn.Module, name: str, optimizers: Callable[[], Iterable[Any]]) -> bool:
        """Stores a matrix, its gradient and its moments by columns; whether there was anything to do.

        Args:
            module: Whose parameter it is.
            name: The parameter's.
            optimizers: Those that may have moments of it, now and at the time of `undo`.
        """
        if not self.options.layout or not store_transposed(module, name, optimizers()):
            return False
        self._undo.append(lambda: _store(module, name, optimizers(), back=True))
        return True

    def share(self, module: nn.Module, d_sae: int, optimizers: Callable[[], Iterable[Any]]) -> None:
        """Leaves this process its part of the features of an accelerated object, and of the moments of optimisers.

        Gradients are dropped, then and in `undo`, which puts the parts of all processes together: each of them calls it.

        Args:
            module: Whose parameters have SAELens' names; the first process's are taken where they differ.
            d_sae: Number of features of the whole.
            optimizers: Those that may have moments of it, now and at the time of `undo`.
        """
        if self.options.mesh is None:
            return
        sharding = Sharding(d_sae, self.options.mesh)
        _check_same(sharding, module, optimizers())
        getattr(module, STATE).sharding = sharding
        for buffer in module.buffers():
            sharding.world.broadcast_(buffer, "weights")

        def change_all(change: Callable[[str, Tensor], Tensor]) -> None:
            for name, p in module.named_parameters():
                p.grad = None
                _replace(p, optimizers(), partial(change, name))

        change_all(sharding.part_of_first)
        self._undo.append(lambda: change_all(sharding.whole))

    def subclass(self, cls: Any, prepare: Callable[[Any], object]) -> type:
        """A fast class whose objects are accelerated from birth; `prepare` stores the matrices of each."""
        tally, options = self.tally, self.options

        def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:  # noqa: N807
            self.__dict__[STATE] = State(tally, options)
            cls.__init__(self, *arguments, **keywords)
            if options.layout:
                prepare(self)

        return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _check_same(sharding: Sharding, module: nn.Module, optimizers: Iterable[Any]) -> None:
    """Raises UsageError unless all processes have tensors of the same sizes and dtypes, which they are about to exchange."""
    states = [(name, optimizer.state.get(p, {})) for optimizer in optimizers for name, p in module.named_parameters()]
    tensors = dict(module.named_parameters()) | {
        f"{key} of {name}": value for name, state in states for key, value in state.items()
    }
    own = {name: f"{tuple(value.shape)} {value.dtype}" for name, value in tensors.items() if isinstance(value, Tensor)}
    for rank, other in enumerate(sharding.world.gather_objects(own)):
        names = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        if names:
            raise UsageError(
                f"obj: expected the same SAE and optimiser in every process, got {names[0]}: {own.get(names[0])} here and "
                f"{other.get(names[0])} in process {rank}"
            )


def store_transposed(module: nn.Module, name: str, optimizers: Iterable[Any] = ()) -> bool:
    """`Handle.store_transposed`, for good."""
    p = module._parameters.get(name)
    if p is None or p.is_meta or type(p.data) is not Tensor or p.t().is_contiguous():
        return False
    _store(module, name, optimizers, back=False)
    return True


@torch.no_grad()
def _store(module: nn.Module, name: str, optimizers: Iterable[Any], *, back: bool) -> None:
    p = module._parameters[name]
    assert p is not None

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous() if back else tensor.t().contiguous().t()

    if p.grad is not None:
        p.grad = laid_out(p.grad)
    _replace(p, optimizers, laid_out)


@torch.no_grad()
def _replace(p: Tensor, optimizers: Iterable[Any], change: Callable[[Tensor], Tensor]) -> None:
    """Changes a parameter, and the moments that optimisers have of it."""
    shape = p.shape
    p.data = change(p.data)
    for optimizer in optimizers:
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = change(value)
