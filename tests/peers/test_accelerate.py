"""What `accelerate` does without a peer: imports, refusals, and activations that remember their entries."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import peer_files
import pytest
import torch

import fastsae_kernels as kernels
from fastsae import SparseAutoencoder, UsageError, accelerate
from fastsae.peers import pair
from fastsae.peers.handle import Handle, Options, Tally, store_transposed
from fastsae.peers.lazy import Lazy

ROOT = Path(__file__).parents[2]


def test_no_peer_is_imported_before_its_object_comes() -> None:
    program = (
        "import sys, fastsae, torch\n"
        "assert 'fastsae.peers' not in sys.modules\n"
        "try: fastsae.accelerate(torch.nn.Linear(2, 2))\n"
        "except fastsae.UsageError as error: print(error)\n"
        "assert not {'sae_lens', 'sparsify', 'dictionary_learning', 'transformer_lens'} & sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "expected an object of sae-lens, eai-sparsify, dictionary-learning" in run.stdout


@pytest.mark.parametrize(
    "obj", [None, 3, "sae", torch.nn.Linear, {"a": 1}, object()], ids=lambda obj: type(obj).__name__
)
def test_what_is_of_no_peer_is_refused(obj: object) -> None:
    with pytest.raises(UsageError, match="obj: expected an object of"):
        accelerate(obj)


@pytest.mark.parametrize("write", [peer_files.saelens, peer_files.gemma_scope, peer_files.sparsify])
def test_a_folder_of_any_library_is_taken(tmp_path: Path, write: Callable[[Path], peer_files.PeerFile]) -> None:
    file = write(tmp_path)
    with accelerate(file.path) as handle:
        x = torch.randn(5, peer_files.D_IN)
        torch.testing.assert_close(handle.accelerated.encode(x), SparseAutoencoder.load(file.path).encode(x))
    assert f"SAE of {file.path}, as handle.accelerated" in handle.report()
    with pytest.raises(UsageError, match="or a folder or hub id that holds an SAE, got"):
        accelerate(tmp_path / "missing")


def test_a_class_that_only_claims_to_be_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = type("JumpReLUSAE", (), {"__module__": "sae_lens.saes"})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "7.0.0")
    with pytest.raises(UsageError, match=r"sae-lens: expected version 6\.54, .* got 7\.0\.0"):
        accelerate(fake())

    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", not_installed)  # another package's module of that name
    with pytest.raises(UsageError, match="got none that is installed"):
        accelerate(fake())


def listed(n: int, d_sae: int, dtype: torch.dtype = torch.float32) -> tuple[kernels.SparseActs, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    x, W_enc = torch.randn(n, 8, generator=g, dtype=dtype), torch.randn(8, d_sae, generator=g, dtype=dtype)
    gate = torch.full((d_sae,), 2.0, dtype=torch.promote_types(dtype, torch.float32))
    acts = kernels.encode(x, W_enc, W_enc.new_zeros(d_sae), gate)
    hidden_pre = x.double() @ W_enc.double()
    return acts, hidden_pre * (hidden_pre > 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d_sae"), [(1, 1), (1, 300), (40, 300), (12, 7)])
def test_entries_become_dense_and_are_found_again(n: int, d_sae: int, dtype: torch.dtype) -> None:
    acts, expected = listed(n, d_sae, dtype)
    dense = pair.to_dense(acts, (1, n, d_sae), dtype)
    assert dense.dtype == dtype
    assert dense.shape == (1, n, d_sae)
    if dtype in (torch.float64, torch.float32):
        torch.testing.assert_close(dense[0].double(), expected, rtol=1e-5, atol=1e-5)
    found = pair.entries_of(dense)
    assert found is not None
    assert torch.equal(found.to_dense(), dense[0].to(found.values.dtype))  # rounded as the dense numbers are


def test_padded_entries_become_dense() -> None:
    acts, _ = listed(5, 30)
    counts = acts.row_offsets.diff()
    width = int(counts.max()) + 2
    padded = kernels.SparseActs(
        torch.arange(0, 5 * width + 1, width),
        torch.zeros(5 * width, dtype=torch.int32),
        torch.zeros(5 * width),
        acts.shape,
        row_counts=counts,
    )
    slots = torch.arange(len(acts.values)) - acts.row_offsets.long()[acts.row_ids()]
    at = acts.row_ids() * width + slots
    padded.indices[at], padded.values[at] = acts.indices, acts.values
    assert torch.equal(pair.to_dense(padded, acts.shape, torch.float32), acts.to_dense())


def test_a_tensor_is_forgotten_with_its_last_reference() -> None:
    before = len(pair._entries)
    dense = pair.to_dense(listed(4, 20)[0], (4, 20), torch.float32)
    assert len(pair._entries) == before + 1
    assert pair.entries_of(dense.clone()) is None
    assert pair.entries_of(copy.deepcopy(dense)) is None
    assert pair.entries_of(dense[:2]) is None
    del dense
    gc.collect()
    assert len(pair._entries) == before


def test_an_exchange_of_two_numbers_is_an_edit() -> None:
    acts, _ = listed(4, 20)
    dense = pair.to_dense(acts, (4, 20), torch.float32)
    first, second = acts.values[:2].tolist()
    assert first != second
    dense[acts.row_ids()[0], acts.indices[0].long()] = second
    assert pair.entries_of(dense) is None
    dense[acts.row_ids()[0], acts.indices[0].long()] = first
    assert pair.entries_of(dense) is not None
    dense[0, 0] = float("nan")
    assert pair.entries_of(dense) is None


def test_storage_moves_with_gradient_and_moments() -> None:
    module = torch.nn.Linear(6, 4, bias=False)
    adam = torch.optim.Adam(module.parameters(), lr=0.1)
    module(torch.randn(3, 6)).sum().backward()
    adam.step()
    p = module.weight
    values = [tensor.clone() for tensor in (p.data, p.grad, adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"])]
    handle = Handle(module, Options())
    assert handle.store_transposed(module, "weight", lambda: [adam])
    for is_transposed in (True, False):
        now = [p.data, p.grad, adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"]]
        for tensor, value in zip(now, values, strict=True):
            assert tensor.t().is_contiguous() == is_transposed
            assert torch.equal(tensor, value)
        handle.undo()
    assert not store_transposed(module, "bias")
    assert not Handle(module, Options(layout=False)).store_transposed(module, "weight", tuple)


def test_a_lazy_field_calls_once() -> None:
    class Output:
        field = Lazy()

    output, calls = Output(), []
    output.field = lambda: calls.append(1) or 5
    assert (output.field, output.field, len(calls)) == (5, 5, 1)
    output.field = 7
    assert output.field == 7
    assert isinstance(Output.field, Lazy)


def test_rows_are_counted_where_they_are() -> None:
    tally = Tally()
    for n in (2, 0, 3):
        tally.count_rows("odd", torch.tensor(n))
    tally.count_rows("none", torch.tensor(0))
    assert tally.rows() == {"odd": 5}
