"""The file that several processes write together is the one that a single process would write, byte for byte."""

from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path

import pytest
import torch
from processes import run
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

import fastsae
from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder, disk
from fastsae.distributed import gathered
from fastsae.distributed.groups import Group
from fastsae.distributed.parts import bounds
from fastsae.distributed.together import OtherProcessError

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
DIMS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "mask": 0, "rows_in_memory": 1}
D_IN = 6


def whole(d_sae: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(d_sae)
    return {
        "b_dec": torch.randn(D_IN, generator=generator),
        "W_enc": torch.randn(D_IN, d_sae, generator=generator),
        "rows_in_memory": torch.randn(d_sae, D_IN, generator=generator).t(),
        "topk_threshold": torch.tensor(0.25, dtype=torch.float64),
        "W_dec": torch.randn(d_sae, D_IN, generator=generator).to(torch.bfloat16),
        "b_enc": torch.randn(d_sae, generator=generator),
        "mask": torch.arange(d_sae) % 3 == 0,
        "counts": torch.arange(3),
        "none": torch.empty(0, 4),
    }


def part(tensors: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """This process's part, with W_enc stored as its rows are read by the kernels."""
    parts = dict(tensors)
    for name in DIMS.keys() & tensors.keys():
        start, end = bounds(tensors[name].shape[DIMS[name]], group.size, group.rank)
        parts[name] = tensors[name].narrow(DIMS[name], start, end - start)
    return parts


SIZES = [7, 4, 2, 1]  # of three processes, the last has fewer features, or none, or two have none
BLOCKS = [1, 100, 2**25]


def write(folder: str) -> None:
    group = Group(distributed.group.WORLD)
    for d_sae in SIZES:
        for gathered.BLOCK_BYTES in BLOCKS:
            path = Path(folder) / f"{d_sae}-{gathered.BLOCK_BYTES}.safetensors"
            gathered.write_tensors(path, part(whole(d_sae), group), DIMS, group)


@pytest.mark.parametrize("n_processes", [2, 3])
def test_same_bytes_as_one_process(tmp_path: Path, n_processes: int) -> None:
    run(write, n_processes, tmp_path, str(tmp_path))
    alone = tmp_path / "alone.safetensors"
    for d_sae in SIZES:
        disk.write_tensors(alone, {name: tensor.contiguous() for name, tensor in whole(d_sae).items()})
        for block_bytes in BLOCKS:
            found = tmp_path / f"{d_sae}-{block_bytes}.safetensors"
            assert found.read_bytes() == alone.read_bytes(), found
            assert found.stat().st_mode == alone.stat().st_mode
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_process_alone(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in whole(5).items()}
    gathered.write_tensors(tmp_path / "a", tensors, DIMS, Group())
    disk.write_tensors(tmp_path / "b", tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def failing(folder: str) -> list[str]:
    """What each process says of a full disk amid the file, of a place that is a file, and of parts that do not fit."""
    group = Group(distributed.group.WORLD)
    gathered.BLOCK_BYTES = 2**12
    tensors = {"W_dec": torch.ones(3000, 8), "W_enc": torch.ones(8, 3000)}
    said = []
    if group.rank == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))
    for place, numbers in (("full", [errno.EFBIG]), ("file/below", [errno.ENOTDIR, errno.EEXIST])):
        try:
            gathered.write_tensors(Path(folder) / place, part(tensors, group), DIMS, group)
        except OSError as error:
            said.append("own" if error.errno in numbers else str(error))
        except OtherProcessError as error:
            said.append(str(error))
    try:
        gathered.write_tensors(Path(folder) / "x", {"b_dec": torch.ones(3 + group.rank)}, DIMS, group)
    except ValueError as error:
        said.append(str(error))
    return said


def test_an_error_ends_all_processes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").write_text("what was there")
    first, second = run(failing, 2, tmp_path, str(tmp_path))
    assert first[:2] == ["own", "own"]
    assert second[0].startswith(f"process 0 could not write {tmp_path / 'full'}: [Errno {errno.EFBIG}]")
    assert second[1].startswith(f"process 0 could not write {tmp_path / 'file/below'}: [Errno ")
    assert "b_dec: expected parts of one tensor" in first[2]
    assert "b_dec: expected parts of one tensor" in second[2]
    assert (tmp_path / "full").read_text() == "what was there"
    assert {path.name for path in tmp_path.iterdir()} - {"store"} == {"0.pt", "1.pt", "file", "full"}


def saes() -> dict[str, SparseAutoencoder]:
    torch.manual_seed(0)
    made: dict[str, SparseAutoencoder] = {
        "jumprelu": FusedJumpReLUSAE(D_IN, 7, log_threshold=True, init_threshold=0.5),
        "topk": FusedTopKSAE(D_IN, 4, k=2),
        "batchtopk": FusedBatchTopKSAE(D_IN, 5, k=2),
        "relu": FusedReLUSAE(D_IN, 2),
    }
    with torch.no_grad():
        for parameter in (parameter for sae in made.values() for parameter in sae.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def save_sharded_saes(folder: str) -> list[str]:
    """Saves each of them; returns what `save` says of one that holds NaN in the second process alone."""
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("data", "feature"))
    for name, sae in saes().items():
        fastsae.shard(sae, mesh)
        sae.save(Path(folder) / name, model_name="a model")
    with torch.no_grad():
        sae.W_dec[:1] = torch.nan  # the third process has no feature of this one
    said = []
    for metadata in ({}, {"layer": object()}):
        try:
            sae.save(Path(folder) / "not written", **metadata)
        except (ValueError, TypeError, OtherProcessError) as error:
            said.append(f"{type(error).__name__}: {error}")
        with torch.no_grad():
            sae.W_dec[:1] = 1
    return said


def test_a_sharded_sae_is_saved_as_a_whole_one(tmp_path: Path) -> None:
    said = run(save_sharded_saes, 3, tmp_path, str(tmp_path))
    for name, sae in saes().items():
        sae.save(tmp_path / "whole" / name, model_name="a model")
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes(), name
    assert not (tmp_path / "not written").exists()
    assert [words[0] for words in said[:2]] == [
        "ValueError: W_dec: expected finite numbers to save, got NaN or infinity; nothing was written"
    ] * 2
    assert said[2][0].startswith("OtherProcessError: process 0 could not save the SAE: W_dec: expected finite numbers")
    assert all("not JSON serializable" in words[1] for words in said)
