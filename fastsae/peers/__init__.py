"""Other libraries' sparse autoencoders on the fused ops: `accelerate` swaps an object's class, and its handle swaps it back.

A peer's module is imported only when one of its objects is handed in, so that nothing here needs a peer to be installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, NamedTuple

from fastsae.distributed import Groups, groups_of
from fastsae.distributed.together import together
from fastsae.errors import UsageError
from fastsae.peers.handle import Handle, Options
from fastsae.sae import SparseAutoencoder
from fastsae.sae.shards import shard

__all__ = ["Handle", "accelerate"]


class _Peer(NamedTuple):
    """A library whose objects `accelerate` takes."""

    module: str  # ours
    distribution: str
    series: str  # the releases whose code was read: a newer one may compute something else


_PEERS = {
    "sae_lens": _Peer("saelens", "sae-lens", "6.54"),
    "sparsify": _Peer("sparsify", "eai-sparsify", "1.3"),
    "dictionary_learning": _Peer("dictionary_learning", "dictionary-learning", "0.1"),
}


def accelerate(
    obj: Any, *, optimizer: bool = False, layout: bool = True, fix_auxk: bool = False, mesh: Any = None
) -> Handle:
    """Makes an object of SAELens, sparsify or dictionary_learning run on the fused ops, with the peer's numbers.

    The object stays what it is: same class for `isinstance`, same parameters, state dict, files and hooks. Each call
    decides for itself: where a hook is attached, a method is replaced or an option is not covered, the peer's own code runs, and
    the handle counts why. Classes that are not known, a user's subclass for one, are left alone and named in the report.

        with fastsae.accelerate(trainer) as handle:
            trainer.fit()
        print(handle.report())

    What the peer returns densely is computed when it is read, and carries no gradient then: a loss of your own on
    `feature_acts` or `hidden_pre` of a training step has no effect on the weights. There are no second derivatives. Sums run in
    another order than the peer's, so that an activation within rounding of its gate may open it in one of them alone. On a CPU
    a trainer's own `torch.optim.Adam` steps by PyTorch's fused kernel, and the memory of the last gradients of the weights and
    of `encode`'s last result is kept for the next.

    Args:
        obj: SAELens: an SAE, an `SAETrainer`, a `MultiSAETrainer`, a model that holds SAEs, or the module `sae_lens` itself for
            every SAE and trainer that is made from then on. sparsify: a `SparseCoder` or a `Trainer`. dictionary_learning: a
            dictionary, a trainer, or a trainer class, whose fast subclass is `handle.accelerated`. Or a list or a dict of such. A
            folder or hub id in any format that `fastsae convert` reads: `handle.accelerated` is then an SAE of fastsae.
        optimizer: Put `FusedSAEAdam` in the place of the peer's Adam (`SAETrainer` alone).
        layout: Store the encoder or decoder as the ops read it fastest; shapes, names and parameters stay. An optimiser that has
            made steps must be reachable from `obj`, as a trainer's is, or be made afterwards. `torch.randn_like` and its kind
            fill a tensor in the order of its storage, so that weights drawn with a seed afterwards are others than without.
        fix_auxk: Let sparsify's AuxK loss reach the encoder, whose gradient the peer drops: not the peer's numbers.
        mesh: Processes that share the features of SAEs of SAELens, as in `fastsae.shard`: each keeps its part of the weights,
            and every call is made in all of them, `undo` too, which gives each of them the whole weights. What the peer's
            code cannot do with a part raises a UsageError.

    Returns:
        A handle with `report()` and `undo()`; a context manager that undoes at its end.

    Raises:
        UsageError: `obj` is of no peer and names no SAE, the peer's version is not known, an option does not apply, or there
            is something in `obj` that processes cannot share. Then nothing was changed.
    """
    groups = None if mesh is None else groups_of(mesh)
    handle = Handle(obj, Options(optimizer=optimizer, layout=layout, fix_auxk=fix_auxk, mesh=groups))
    if isinstance(obj, str | os.PathLike):
        _load(obj, handle)
        return handle
    if groups is not None:
        with together(groups.world, "share the SAE"):
            _check_shareable(obj, groups)
    try:
        _accelerate(obj, handle)
    except BaseException:
        handle.undo()
        raise
    return handle


def _load(name: str | os.PathLike[str], handle: Handle) -> None:
    try:
        handle.accelerated = SparseAutoencoder.load(os.fspath(name))
    except (FileNotFoundError, ValueError) as error:
        names = ", ".join(peer.distribution for peer in _PEERS.values())
        raise UsageError(
            f"obj: expected an object of {names}, or a folder or hub id that holds an SAE, got {name!r}: {error}"
        ) from None
    if handle.options.mesh is not None:
        shard(handle.accelerated, handle.options.mesh)
    handle.changes.append(f"{type(handle.accelerated).__name__} of {name}, as handle.accelerated")


def _accelerate(obj: Any, handle: Handle) -> None:
    for item in _items(obj):
        peer = _peer_of(item)
        _check_version(peer)
        import_module(f"fastsae.peers.{peer.module}").accelerate(item, handle)


def _check_shareable(obj: Any, groups: Groups) -> None:
    for item in _items(obj):
        peer = _peer_of(item)
        if peer.module != "saelens":
            raise UsageError(
                f"mesh: expected None for {peer.distribution}; SAEs of sae-lens and of fastsae can be shared"
            )
        _check_version(peer)
        import_module(f"fastsae.peers.{peer.module}").check_shareable(item, groups)


def _items(obj: Any) -> Iterator[Any]:
    """The objects in lists and dicts."""
    if isinstance(obj, Mapping):
        obj = list(obj.values())
    if not isinstance(obj, list | tuple):
        yield obj
        return
    if not obj:
        raise UsageError("obj: expected an object of a peer, got none at all")
    for item in obj:
        yield from _items(item)


def _peer_of(obj: Any) -> _Peer:
    """The peer from whose package an object's class, or one of its bases, comes."""
    for name in _module_names(obj):
        peer = _PEERS.get(name.partition(".")[0])
        if peer is not None:
            return peer
    names = ", ".join(peer.distribution for peer in _PEERS.values())
    raise UsageError(f"obj: expected an object of {names}, got {type(obj).__module__}.{type(obj).__qualname__}")


def _module_names(obj: Any) -> Iterable[str]:
    if isinstance(obj, ModuleType):
        return [obj.__name__]
    cls = obj if isinstance(obj, type) else type(obj)
    return [base.__module__ for base in cls.__mro__]


def _check_version(peer: _Peer) -> None:
    try:
        version = metadata.version(peer.distribution)
    except metadata.PackageNotFoundError:
        version = "none that is installed"
    if not f"{version}.".startswith(f"{peer.series}."):
        raise UsageError(
            f"{peer.distribution}: expected version {peer.series}, whose code accelerate() knows, got {version}"
        )
