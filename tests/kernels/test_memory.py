"""Large arrays in cheap pages hold what PyTorch's own would, in its layout."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import problems
import pytest
import torch

import fastsae_kernels as kernels
from fastsae_kernels import gather, memory

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)


@DTYPES
@pytest.mark.parametrize("shape", [(7, 5), (1,), (0, 5), (3, 0)])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    array = memory.zeros(shape, dtype)
    assert torch.equal(array, torch.zeros(shape, dtype=dtype))
    assert torch.equal(array.add_(1), torch.ones(shape, dtype=dtype))  # that is, it can be written


@DTYPES
@pytest.mark.parametrize("layout", ["rows", "columns", "strided", "vector"])
def test_narrowed(layout: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 10)
    tensor = {"rows": tensor, "columns": tensor.t(), "strided": tensor[:, ::2], "vector": tensor[0]}[layout]
    narrow = memory.narrowed(tensor, dtype)
    assert torch.equal(narrow, tensor.to(dtype))
    assert narrow.stride() == tensor.to(dtype).stride()


def test_nothing_is_copied_where_the_dtype_is_the_same() -> None:
    tensor = torch.randn(6, 10)
    assert memory.narrowed(tensor, tensor.dtype) is tensor


@DTYPES
@pytest.mark.parametrize("block", [1, 24, 2**20], ids=["row by row", "blocks", "one block"])
def test_sums_into_a_large_array(block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "BLOCK_ELEMENTS", block)
    counts = torch.tensor([0, 3, 0, 0, 1, 5, 2, 0])  # empty segments at both ends and between
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    indices = torch.randint(9, (int(counts.sum()),), dtype=torch.int32)
    weights, rows = torch.randn(indices.numel()), torch.randn(9, 8).to(dtype)
    large = gather.gather_sum(offsets, indices, weights, rows)
    monkeypatch.setattr(memory, "LARGE_BYTES", 2**40)
    assert torch.equal(large, gather.gather_sum(offsets, indices, weights, rows))
    nothing = gather.gather_sum(torch.zeros(9, dtype=torch.int32), indices[:0], weights[:0], rows)
    assert torch.equal(nothing, torch.zeros(8, 8, dtype=dtype))


@pytest.mark.parametrize("density", [0.02, 0.5], ids=["sparse", "half active"])
@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_gradients_in_large_arrays(density: float, backend: kernels.Backend) -> None:
    problem = problems.make(d_sae=300, density=density)
    inputs = problems.leaves(problem)
    with kernels.use_backend(backend):
        output = kernels.autoencode(*inputs[:6], spec=problem.spec)  # type: ignore[arg-type]
    named = {name: getattr(output, name) for name in ("sae_out", "penalty", "l0", "feature_counts")}
    problems.assert_matches(problems.collect(inputs, named, problem), problem)
    _, W_enc, _, _, W_dec, *_ = inputs
    for weight in (W_enc, W_dec):
        assert weight is not None
        assert weight.grad is not None
        twice = 2 * weight.grad
        assert torch.equal(weight.grad.mul_(2), twice)  # in place, as a clipping of norms does


@DTYPES
def test_spare_memory_is_used_again_once_nobody_holds_it(dtype: torch.dtype) -> None:
    spare = memory.Spare()
    first = spare.zeros((4, 6), dtype)
    assert torch.equal(first, torch.zeros(4, 6, dtype=dtype))
    place = first.fill_(3).data_ptr()
    view = first[1:].numpy(force=True) if dtype != torch.bfloat16 else first[1:]
    del first
    second = spare.zeros((4, 6), dtype)
    assert second.data_ptr() != place
    assert (view == 3).all()
    place = second.fill_(5).data_ptr()
    del second
    third = spare.zeros((6, 4), dtype)
    assert third.data_ptr() == place
    assert torch.equal(third, torch.zeros(6, 4, dtype=dtype))


def test_spare_memory_of_another_size_or_in_a_copy_is_not_used() -> None:
    spare = memory.Spare()
    place = spare.zeros((4, 6), torch.float32).data_ptr()
    for other in (copy.deepcopy(spare), pickle.loads(pickle.dumps(spare))):
        assert not other._kept
    other = spare.zeros((4, 7), torch.float32)
    assert other.data_ptr() != place
    assert other.shape == (4, 7)
    assert len(spare._kept) == 1


def test_spare_memory_goes_to_one_thread_alone() -> None:
    spare = memory.Spare()
    spare.zeros((8, 8), torch.float32)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: spare.zeros((8, 8), torch.float32).fill_(i), range(64)))
    assert [float(tensor.sum()) for tensor in made] == [64.0 * i for i in range(64)]


def test_gradients_lie_where_those_of_the_last_step_lay_unless_somebody_holds_them() -> None:
    problem, hint = problems.make(64, 32, 128, density=0.05), kernels.ActivityHint()
    tensors = problems.leaves(problem)[:6]
    W_enc, W_dec = tensors[1], tensors[4]
    assert W_enc is not None
    assert W_dec is not None

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        W_enc.grad = W_dec.grad = None
        output = kernels.autoencode(*tensors, spec=problem.spec, hint=hint)  # type: ignore[arg-type]
        output.sae_out.backward(problem.grad_out)
        assert W_enc.grad is not None
        assert W_dec.grad is not None
        return W_enc.grad, W_dec.grad

    expected = [grad.clone() for grad in gradients()]
    places = [grad.data_ptr() for grad in gradients()]
    held = gradients()
    assert [grad.data_ptr() for grad in held] == places
    for grad, other in zip(gradients(), held, strict=True):
        assert grad.data_ptr() != other.data_ptr()
        assert torch.equal(grad, other)
    assert all(torch.equal(grad, value) for grad, value in zip(held, expected, strict=True))
