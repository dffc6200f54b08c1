"""pytest plugin: a launch in Triton's interpreter fails where two of its programs race for an element of memory.

The interpreter runs the programs of a launch one after the other, so a kernel whose result depends on their order passes its
tests. The plugin notes which program loads, stores and updates which address. At the end of the launch it raises `RaceError`
where one program stores what another one stores, loads or updates by an atomic, or loads what another one updates.
`BENIGN` lists what is allowed all the same. tests/conftest.py turns the plugin on, `-p no:race_detector` turns it off.

    --program-order shuffle   every launch runs its programs in a random order; the seed is printed at the end
    --program-order 1234      the same with a given seed

It cannot see races between the threads of one program, nor in which order a GPU's memory shows what was written.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

LOADS, STORES, UPDATES = "loads", "stores", "updates by an atomic"
RACING = ((STORES, STORES), (STORES, LOADS), (STORES, UPDATES), (UPDATES, LOADS))
# (kernel, argument, kind of the one access, of the other): why the race cannot change a result
BENIGN = {
    (
        "_compact_kernel",
        "into.cursor",
        STORES,
        STORES,
    ): "all programs store the count that they all read, or none does",
}


class RaceError(AssertionError):
    """Programs of a launch race; the message names the kernel, the argument, its element, the programs and the lines."""


class Access(NamedTuple):
    """One load, store or atomic of one program."""

    program: int
    addresses: np.ndarray  # [n] uint64: those of the elements that the mask lets through
    itemsize: int
    line: tuple[str, int]


class Touched(NamedTuple):
    """The addresses that accesses of one kind touch, in ascending order, and who touches each of them."""

    addresses: np.ndarray
    lowest: np.ndarray  # number of the first program that does
    highest: np.ndarray  # of the last one


def _pieces(access: Access, unit: int) -> np.ndarray:
    """Addresses of the pieces of `unit` bytes that the accessed elements consist of."""
    if access.itemsize == unit:
        return access.addresses
    return (access.addresses[:, None] + np.arange(0, access.itemsize, unit, dtype=np.uint64)).ravel()


def _touched(accesses: list[Access], unit: int) -> Touched:
    pieces = [_pieces(access, unit) for access in accesses]
    addresses = np.concatenate(pieces)
    programs = np.repeat([access.program for access in accesses], [len(piece) for piece in pieces])
    order = np.argsort(addresses, kind="stable")
    addresses, programs = addresses[order], programs[order]
    starts = np.flatnonzero(np.concatenate(([True], addresses[1:] != addresses[:-1])))
    return Touched(addresses[starts], np.minimum.reduceat(programs, starts), np.maximum.reduceat(programs, starts))


def _near(loads: list[Access], written: np.ndarray, unit: int) -> list[Access]:
    """The loads in whose range some written address lies; most are of arguments that the kernel never writes."""
    if not loads:
        return []
    first = np.array([load.addresses.min() for load in loads])
    last = np.array([load.addresses.max() + np.uint64(load.itemsize - unit) for load in loads])
    near = np.searchsorted(written, first) < np.searchsorted(written, last, side="right")
    return [load for load, kept in zip(loads, near, strict=True) if kept]


def _raced(one: Touched, other: Touched) -> np.ndarray:
    """Addresses that one program touches in the one way and a different program in the other way."""
    addresses, i, j = np.intersect1d(one.addresses, other.addresses, assume_unique=True, return_indices=True)
    lowest = np.minimum(one.lowest[i], other.lowest[j])
    return addresses[lowest != np.maximum(one.highest[i], other.highest[j])]


class Launch:
    """The accesses of one launch, and the arguments that they go to."""

    def __init__(self, kernel: str, arguments: dict[str, Tensor]) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.accesses: dict[str, list[Access]] = {LOADS: [], STORES: [], UPDATES: []}

    def note(self, kind: str, program: int, pointers: Any, mask: Any, dtype: Any, line: tuple[str, int]) -> None:
        """Remember an access."""
        pointers, mask = np.asarray(pointers), np.asarray(mask)
        addresses = pointers.ravel() if mask.all() else pointers[np.broadcast_to(mask, pointers.shape)]
        if len(addresses):
            addresses = addresses.astype(np.uint64, copy=False)
            self.accesses[kind].append(Access(program, addresses, np.dtype(dtype).itemsize, line))

    def races(self) -> list[str]:
        """What races and is not benign: a line for each argument and pair of kinds."""
        writes = self.accesses[STORES] + self.accesses[UPDATES]
        if not writes:
            return []
        unit = min(access.itemsize for accesses in self.accesses.values() for access in accesses)
        written = np.unique(np.concatenate([_pieces(write, unit) for write in writes]))
        suspects = {**self.accesses, LOADS: _near(self.accesses[LOADS], written, unit)}
        touched = {kind: _touched(accesses, unit) for kind, accesses in suspects.items() if accesses}
        found: dict[tuple[str, str, str, str], str] = {}
        for one, other in RACING:
            raced = _raced(touched[one], touched[other]) if one in touched and other in touched else ()
            for address in map(int, raced):
                name, element = self._argument(address)
                key = (self.kernel, name, one, other)
                if key not in found and key not in BENIGN:
                    ways = [self._who(kind, address) for kind in dict.fromkeys((one, other))]
                    found[key] = f"{self.kernel}: {name}[{element}]: {'; '.join(ways)}"
        return list(found.values())

    def _argument(self, address: int) -> tuple[str, int]:
        """Name and element of the argument at an address: where arguments share memory, the one that begins last before it."""
        found = [("memory of no argument", 0, 0)]
        for name, tensor in self.arguments.items():
            storage, start = tensor.untyped_storage(), tensor.data_ptr()
            if start <= address < storage.data_ptr() + storage.nbytes():
                found.append((name, (address - start) // tensor.element_size(), start))
        return max(found, key=lambda argument: argument[2])[:2]

    def _who(self, kind: str, address: int) -> str:
        """The programs that touch an address in one way, and the kernel's lines where they do."""
        here = [
            access
            for access in self.accesses[kind]
            if ((access.addresses <= address) & (address < access.addresses + np.uint64(access.itemsize))).any()
        ]
        programs = sorted({access.program for access in here})
        numbers = ", ".join(map(str, programs[:4])) + (", ..." if len(programs) > 4 else "")
        lines = sorted({f"{Path(file).name}:{number}" for file, number in (access.line for access in here)})
        return f"program {numbers} {kind} ({', '.join(lines)})"


class Watch:
    """Stands between Triton's interpreter and its memory, and says in which order programs run.

    Args:
        interpreter: The module `triton.runtime.interpreter`.
        seed: What the order of programs depends on; None leaves it as it is.

    Raises:
        pytest.UsageError: Where this version of Triton lacks what the plugin replaces.
    """

    MEMORY = types.MappingProxyType({"load": LOADS, "store": STORES, "atomic_rmw": UPDATES, "atomic_cas": UPDATES})

    def __init__(self, interpreter: types.ModuleType, seed: str | None) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.launch: Launch | None = None
        self.launches = 0
        self.order: Sequence[int] = range(1)
        self.package = str(Path(interpreter.__file__).parents[1])  # type: ignore[arg-type]
        try:
            self.builder = interpreter.interpreter_builder
            self._watch_memory(interpreter)
            self._watch_launches(interpreter.GridExecutor)
            self._order_programs(type(self.builder))
        except AttributeError as error:
            raise pytest.UsageError(
                f"tests/kernels/race_detector.py does not fit this version of Triton: {error}"
            ) from None

    def begin_test(self, name: str) -> None:
        """Make the order of programs in a test independent of what ran before it."""
        self.random.seed(f"{self.seed} {name}")

    def _program(self) -> int:
        """Number of the program that runs."""
        (x, y, z), (_, height, depth) = self.builder.grid_idx, self.builder.grid_dim
        return (x * height + y) * depth + z

    def _line(self) -> tuple[str, int]:
        """File and line of the kernel's access: of the innermost function that is neither Triton's nor this file's."""
        frame = sys._getframe(2)
        while frame.f_code.co_filename.startswith(self.package) and frame.f_back is not None:
            frame = frame.f_back
        return frame.f_code.co_filename, frame.f_lineno

    def _watch_memory(self, interpreter: types.ModuleType) -> None:
        memory = interpreter._interpreter

        def watched(name: str, kind: str) -> Callable[..., Any]:
            original = getattr(memory, name)

            def access(*arguments: Any) -> Any:
                if self.launch is not None:
                    pointers, mask, dtype = _operands(name, arguments)
                    self.launch.note(kind, self._program(), pointers, mask, dtype, self._line())
                return original(*arguments)

            return access

        stand_in = types.ModuleType(memory.__name__)
        vars(stand_in).update(vars(memory), **{name: watched(name, kind) for name, kind in self.MEMORY.items()})
        interpreter._interpreter = stand_in

    def _watch_launches(self, executor: type) -> None:
        call = executor.__call__

        @functools.wraps(call)
        def launch(this: Any, *arguments: Any, **options: Any) -> None:
            named = {**dict(zip(this.arg_names, arguments, strict=False)), **options}
            self.launch = Launch(this.fn.__name__, dict(_tensors(named)))
            self.launches += 1
            try:
                call(this, *arguments, **options)
                races = self.launch.races()
            finally:
                self.launch = None
            if races:
                raise RaceError("\n".join(races))

        executor.__call__ = launch  # type: ignore[method-assign]

    def _order_programs(self, builder: Any) -> None:
        set_size, set_program = builder.set_grid_dim, builder.set_grid_idx

        def begin(this: Any, *size: int) -> None:
            set_size(this, *size)
            programs = range(size[0] * size[1] * size[2])
            self.order = programs if self.seed is None else self.random.sample(programs, len(programs))

        def next_program(this: Any, x: int, y: int, z: int) -> None:
            _, height, depth = this.grid_dim
            number = self.order[(x * height + y) * depth + z]
            set_program(this, number // (height * depth), number // depth % height, number % depth)

        builder.set_grid_dim, builder.set_grid_idx = begin, next_program


def _operands(name: str, arguments: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """`(pointers, mask, dtype)` of a call of the interpreter's memory."""
    if name == "load":
        pointers, mask, _, dtype = arguments
    elif name == "store":
        pointers, value, mask = arguments
        dtype = value.dtype
    elif name == "atomic_rmw":
        _, pointers, value, mask, _ = arguments
        dtype = value.dtype
    else:
        pointers, _, value, _ = arguments
        mask, dtype = np.True_, value.dtype
    return pointers, mask, dtype


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a launch's arguments, those in tuples and descriptors too."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            yield from _tensors({f"{name}.{field}": part for field, part in zip(fields, value, strict=True)})
        elif isinstance(getattr(value, "base", None), Tensor):
            yield name, value.base


WATCH = pytest.StashKey[Watch]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--program-order", metavar="shuffle|SEED", help="order of a launch's programs in the interpreter")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        if config.option.program_order is not None:
            raise pytest.UsageError("--program-order: expected Triton's interpreter, which TRITON_INTERPRET=1 selects")
        return
    if config.option.program_order == "shuffle":
        config.option.program_order = str(random.SystemRandom().randrange(10**6))  # the workers get it from here
    interpreter = importlib.import_module("triton.runtime.interpreter")
    config.stash[WATCH] = Watch(interpreter, config.option.program_order)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if WATCH in item.config.stash:
        item.config.stash[WATCH].begin_test(item.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.program_order is not None:
        terminalreporter.write_line(f"programs ran in a random order: --program-order {config.option.program_order}")
