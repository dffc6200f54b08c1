"""With several GPUs every kernel is launched on the device of its tensors, shown on tensors of a second GPU that is not there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from gpu_helpers import CHECKED, SECOND_DEVICE, TwoDevices, needs_kernels
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsae_kernels import AutoencodeSpec
from fastsae_kernels.types import AutoencodeNeeds, Capacity, OutputGrads, PassInputs
from fastsae_kernels.weight_gradients import WeightGradients

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(CHECKED, reason="ttsem answers for the device, in place of the two made up here"),
]

N, D_IN, D_SAE, LONG = 1024, 64, 4096, 8200  # a row of that many elements is longer than one program sums


class OnSecondDevice(TorchFunctionMode):
    """Inside, every tensor has a shape and a dtype, no numbers, and says that it lies on the second GPU."""

    ANSWERS: ClassVar = {Tensor.device.__get__: SECOND_DEVICE, Tensor.is_cuda.__get__: True, Tensor.data_ptr: 0}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.ANSWERS:
            return self.ANSWERS[function]
        kwargs = kwargs or {}
        return function(*args, **({**kwargs, "device": "meta"} if "device" in kwargs else kwargs))


@dataclass
class Launches:
    """The kernels that were launched, and those of them on a device other than the second."""

    devices: TwoDevices
    names: set[str] = field(default_factory=set)
    misplaced: set[str] = field(default_factory=set)
    recorded: list[Tensor] = field(default_factory=list)  # what must not be reused before a stream has read it

    def instead(self, kernel: Any) -> Callable[..., None]:
        """Stands in for `kernel[grid]`."""

        def launch(**arguments: object) -> None:
            name = kernel.fn.__name__
            self.names.add(name)
            if self.devices.current != SECOND_DEVICE.index:
                self.misplaced.add(name)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Nothing is launched, on an H100 that is the second GPU of a machine."""
    from fastsae_kernels.gpu import config, list_descriptors

    found = Launches(TwoDevices(monkeypatch))
    kernel = next(value for name, value in vars(list_descriptors).items() if name.endswith("_kernel"))
    monkeypatch.setattr(type(kernel), "__getitem__", lambda kernel, grid: found.instead(kernel))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: found.recorded.append(tensor))
    with config.override("sm_90"), OnSecondDevice():
        yield found
    for known in (config.capability, list_descriptors._multiprocessors):
        known.cache_clear()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=SECOND_DEVICE)


def passes(spec: AutoencodeSpec, d_in: int, dtype: torch.dtype) -> tuple[PassInputs, Any, WeightGradients]:
    """A training pass with and without an optimiser that sums the weight gradients."""
    from fastsae_kernels import gpu

    x, W_enc, W_dec = empty(N, d_in, dtype=dtype), empty(D_SAE, d_in, dtype=dtype).t(), empty(D_SAE, d_in, dtype=dtype)
    inputs = PassInputs(x, W_enc, empty(D_SAE, dtype=dtype), empty(D_SAE), W_dec, empty(d_in, dtype=dtype), target=x)
    output, kept = gpu.forward(inputs, spec, Capacity(32, 32))
    grads = OutputGrads(output.sae_out, empty(N), empty(N))
    collected = WeightGradients(W_enc, W_dec)
    for into in (None, collected):
        gpu.backward(inputs, kept, spec, grads, AutoencodeNeeds(), into)
    return inputs, kept.acts, collected


def test_every_kernel_is_launched_on_the_device_of_its_tensors(launches: Launches) -> None:
    from fastsae_kernels import gpu
    from fastsae_kernels.gates import Features
    from fastsae_kernels.gpu import gates
    from fastsae_kernels.gpu.adam import adam_rows, grad_norms

    for spec, d_in, dtype in (
        (AutoencodeSpec(bandwidth=0.05), D_IN, torch.bfloat16),
        (AutoencodeSpec(bandwidth=0.05), D_IN, torch.float32),
        (AutoencodeSpec(penalty="l1"), LONG, torch.bfloat16),
        (AutoencodeSpec(bandwidth=0.05, k=4), D_IN, torch.bfloat16),
        (AutoencodeSpec(k=300), D_IN, torch.bfloat16),
        (AutoencodeSpec(k=4, batch_topk=True), D_IN, torch.bfloat16),
    ):
        inputs, acts, collected = passes(spec, d_in, dtype)
    x, W_enc, b_enc, threshold, W_dec, *_ = inputs
    gpu.decode(acts, W_dec)
    gpu.decode_backward(acts, W_dec, x)
    gpu.encode_backward(acts, x, W_enc, acts.values, True)
    gpu.encode(x[:8], W_enc, b_enc, threshold, AutoencodeSpec(k=4))  # so few that tiles through pointers list them
    tile, of_tile = empty(D_SAE, N), Features(b_enc.float(), threshold, None)
    gates.gate_tile(tile, of_tile, AutoencodeSpec(), tile.dtype, False)
    gates.gate_tile_backward(tile, W_dec.float(), x.float(), tile[0], of_tile, AutoencodeSpec(), False)
    for sums in collected.gpu or ():
        assert sums is not None
        rows = empty(D_SAE, D_IN)
        adam_rows(sums, rows, rows, rows, lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, step=1)
        grad_norms(sums, rows)
        sums.dense()
    modules = [
        importlib.import_module(f"{gpu.__name__}.{module.name}") for module in pkgutil.iter_modules(gpu.__path__)
    ]
    assert launches.names == {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert not launches.misplaced


def test_a_step_on_another_stream_holds_what_it_reads(launches: Launches) -> None:
    """Shares were made on the stream of the backward pass, which would reuse their memory as soon as they are cleared."""
    from fastsae_kernels.gpu.adam import adam_rows, grad_norms

    _inputs, _acts, collected = passes(AutoencodeSpec(bandwidth=0.05), D_IN, torch.bfloat16)
    rows = empty(D_SAE, D_IN)
    for sums in collected.gpu or ():
        assert sums is not None
        held = (*sums.by_feature[:3], sums.weights, sums.vectors, sums.extra, sums.extra_flag)
        read = [tensor for tensor in held if tensor is not None]
        for step in (
            lambda sums=sums: adam_rows(sums, rows, rows, rows, lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, step=1),
            lambda sums=sums: grad_norms(sums, rows),
            sums.dense,
        ):
            launches.recorded.clear()
            step()
            assert {id(tensor) for tensor in read} <= {id(tensor) for tensor in launches.recorded}
