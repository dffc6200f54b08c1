"""Any `cfg.json` loads or is one ValueError, and costs no memory; hypothesis makes them up."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (pip install hypothesis)")
st = hypothesis.strategies

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 4, 8, 16, -1, 2**31, 10**9, 10**30])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["jumprelu", "standard", "topk", "batchtopk", "none", "float32", "torch.float16", "relu", "5.1.0"]
    )
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "architecture d_in d_sae dtype device apply_b_dec_to_input normalize_activations reshape_activations metadata k "
    "rescale_acts_by_decoder_norm fastsae_version sae_lens_version activation_fn_str activation_fn activation_fn_kwargs "
    "finetuning_scaling_factor hook_point"
).split()
OWN = "architecture k bandwidth init_threshold ste_to_input log_threshold topk_threshold rescale_acts_by_decoder_norm".split()
IN_METADATA = ["sae_lens_version", "fastsae", "weights_sha256", "training_architecture_details"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for i, sae in enumerate(
        [FusedJumpReLUSAE(8, 16), FusedReLUSAE(8, 16), FusedTopKSAE(8, 16, 4), FusedBatchTopKSAE(8, 16, 4)]
    ):
        made.append(tmp_path_factory.mktemp("sae") / str(i))
        sae.save(made[-1])
    return made


def check(folder: Path, good: bytes, text: bytes) -> None:
    """Loads the folder with another `cfg.json`."""
    path = folder / "cfg.json"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        path.write_bytes(text)
        SparseAutoencoder.load(folder)
    except ValueError as error:
        assert len(str(error)) < 1500  # noqa: PT017 - any other error fails the test
    finally:
        path.write_bytes(good)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def fuzz_values(folders: list[Path], n_examples: int) -> None:
    goods = [(folder / "cfg.json").read_bytes() for folder in folders]

    @hypothesis.settings(max_examples=n_examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        which=st.integers(0, len(folders) - 1),
        top=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
        metadata=st.dictionaries(st.sampled_from(IN_METADATA), VALUES, max_size=2),
        own=st.dictionaries(st.sampled_from(OWN), VALUES, max_size=3),
        gone=st.lists(st.sampled_from(KEYS), max_size=2),
    )
    def run(which: int, top: dict[str, Any], metadata: dict[str, Any], own: dict[str, Any], gone: list[str]) -> None:
        config = json.loads(goods[which])
        config["metadata"]["fastsae"] |= own
        config["metadata"] |= metadata
        config |= top
        for name in gone:
            config.pop(name, None)
        check(folders[which], goods[which], json.dumps(config).encode())

    run()


def fuzz_bytes(folders: list[Path], n_examples: int) -> None:
    good = (folders[0] / "cfg.json").read_bytes()

    @hypothesis.settings(max_examples=n_examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(start=st.integers(0, len(good)), length=st.integers(0, 40), put=st.binary(max_size=40))
    def run(start: int, length: int, put: bytes) -> None:
        check(folders[0], good, good[:start] + put + good[start + length :])

    run()


def fuzz_weights(folders: list[Path], n_examples: int) -> None:
    path = folders[0] / "sae_weights.safetensors"
    good = path.read_bytes()
    config = folders[0] / "cfg.json"
    described = config.read_bytes()
    plain = json.loads(described)
    del plain["metadata"]["weights_sha256"]

    @hypothesis.settings(max_examples=n_examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(start=st.integers(0, 500), length=st.integers(0, 40), put=st.binary(max_size=40))
    def run(start: int, length: int, put: bytes) -> None:
        path.write_bytes(good[:start] + put + good[start + length :])
        try:
            check(folders[0], described, json.dumps(plain).encode())
        finally:
            path.write_bytes(good)

    run()


@pytest.mark.parametrize("fuzz", [fuzz_values, fuzz_bytes, fuzz_weights])
@pytest.mark.parametrize("n_examples", [100, pytest.param(5_000, marks=pytest.mark.slow)])
def test_any_file_loads_or_is_one_value_error(folders: list[Path], fuzz: Any, n_examples: int) -> None:
    fuzz(folders, n_examples)
