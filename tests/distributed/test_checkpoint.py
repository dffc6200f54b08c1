"""Parts of tensors that several processes save, and that any number of processes load."""

from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path

import pytest
import torch
from processes import run
from torch import Tensor, distributed

from fastsae.distributed.groups import Group
from fastsae.distributed.parts import bounds
from fastsae.distributed.together import OtherProcessError

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
DIMS = {"sae.W_enc": 1, "sae.b_enc": 0, "sae.W_dec": 0, "dead_mask": 0, "silent_tokens": 0, "exp_avg.W_enc": 1}
SIZES = [7, 4, 2, 1]  # of three processes, the last has fewer features, or none, or two have none
D_IN = 6


def whole(d_sae: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(d_sae)
    return {
        "sae.b_dec": torch.randn(D_IN, generator=generator),
        "sae.W_enc": torch.randn(d_sae, D_IN, generator=generator).t(),  # in memory as the kernels read it
        "sae.W_dec": torch.randn(d_sae, D_IN, generator=generator).to(torch.bfloat16),
        "sae.b_enc": torch.randn(d_sae, generator=generator, dtype=torch.float64),
        "step": torch.tensor(3.0),
        "exp_avg.W_enc": torch.randn(D_IN, d_sae, generator=generator),
        "silent_tokens": torch.arange(d_sae),
        "dead_mask": torch.arange(d_sae) % 3 == 0,
        "none": torch.empty(0, 4),
    }


def part(tensors: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    parts = dict(tensors)
    for name, dim in DIMS.items():
        start, end = bounds(tensors[name].shape[dim], group.size, group.rank)
        parts[name] = tensors[name].narrow(dim, start, end - start)
    return parts


def saved(folder: str, own_file_bytes: int) -> None:
    from fastsae.distributed import checkpoint

    checkpoint.OWN_FILE_BYTES = own_file_bytes
    group = Group(distributed.group.WORLD if distributed.get_world_size() > 1 else None)
    for d_sae in SIZES:
        checkpoint.save_sharded(Path(folder) / str(d_sae), part(whole(d_sae), group), DIMS, group)


def loaded(folder: str) -> None:
    from fastsae.distributed.checkpoint import load_sharded

    group = Group(distributed.group.WORLD)
    for d_sae in SIZES:
        check(load_sharded(Path(folder) / str(d_sae), DIMS, group), part(whole(d_sae), group))


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("before", "after", "own_file_bytes"), [(2, 3, 2**20), (3, 2, 0)])
def test_any_number_of_processes_loads_what_others_saved(
    tmp_path: Path, before: int, after: int, own_file_bytes: int
) -> None:
    from fastsae.distributed.checkpoint import load_sharded

    run(saved, before, tmp_path, str(tmp_path), own_file_bytes)
    run(loaded, after, tmp_path, str(tmp_path))
    for d_sae in SIZES:
        check(load_sharded(tmp_path / str(d_sae), DIMS, Group()), whole(d_sae))
        names = [path.name for path in (tmp_path / str(d_sae)).iterdir()]
        assert all(name.endswith(".safetensors") for name in names), names  # and no pickle among them
        first = [tmp_path / str(d_sae) / name for name in names if name.startswith("shard-00001")]
        assert len(first) == (1 if own_file_bytes else len(whole(d_sae)))
    next((tmp_path / "7").glob("shard-00001*")).unlink()
    with pytest.raises(ValueError, match="some are missing"):
        load_sharded(tmp_path / "7", DIMS, Group())


def test_one_process_alone(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    from fastsae.distributed.checkpoint import load_sharded, save_sharded

    save_sharded(tmp_path / "x", whole(5), DIMS, Group())
    check(load_sharded(tmp_path / "x", DIMS, Group()), whole(5))
    assert not recwarn.list


def on_a_full_disk(folder: str) -> str:
    from fastsae.distributed.checkpoint import save_sharded

    group = Group(distributed.group.WORLD)
    if group.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))
    start, end = bounds(9999, group.size, group.rank)
    try:
        save_sharded(Path(folder) / "x", {"sae.W_dec": torch.ones(end - start, 8)}, DIMS, group)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return errno.errorcode[error.errno or 0]
    except OtherProcessError as error:
        return str(error)
    return "nothing"


def test_a_full_disk_ends_all_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = run(on_a_full_disk, 3, tmp_path, str(tmp_path))
    assert said[1] == "EFBIG"
    assert said[0] == said[2]
    assert said[0].startswith("process 1 could not write its part: [Errno 27] File too large")
    assert "Traceback" not in capfd.readouterr().err
