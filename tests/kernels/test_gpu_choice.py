"""Which kernel lists the entries of a call, with which tiles, and what is too old to run any."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import needs_kernels
from torch import Tensor

pytestmark = needs_kernels


def chosen(x: Tensor, W_enc: Tensor) -> str:
    from fastsae_kernels.gpu.encode import chosen_listing

    return chosen_listing(x, W_enc)


def test_chosen_listing_says_what_serves_and_why() -> None:
    from fastsae_kernels.gpu import config
    from fastsae_kernels.gpu.choice import use_listing

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, W_enc = meta(4096, 2304), meta(65536, 2304).t()
    with config.override("sm_90"):
        assert chosen(x, W_enc).startswith("list_descriptors: the table of sm_90")
        assert chosen(x[:8], W_enc).startswith("list_pointers: the table of sm_90")
        odd = chosen(meta(4096, 2305), meta(65536, 2305).t())
        assert odd.startswith("list_pointers: the table of sm_90")
        assert "says list_descriptors, but the rows of x are 2305 elements apart" in odd
        assert chosen(x.float(), W_enc.float()).startswith("list_products: the table of sm_90 for torch.float32")
        with use_listing("list_products"):
            assert chosen(x, W_enc) == "list_products: use_listing asks for it"
    with config.override("sm_80"):
        assert chosen(x, W_enc).startswith("list_pointers: the table of sm_80")


def test_no_library_product_in_deterministic_mode() -> None:
    from fastsae_kernels.gpu import config
    from fastsae_kernels.gpu.choice import use_listing

    x, W_enc = torch.empty(256, 64, device="meta"), torch.empty(2048, 64, device="meta").t()
    torch.use_deterministic_algorithms(True)
    try:
        for arch in ("sm_80", "sm_90", "sm_100", "default"):
            with config.override(arch):
                found = chosen(x, W_enc)
                assert found.startswith("list_pointers: ")
                assert "says list_products, but deterministic algorithms are asked for" in found
        with config.override("sm_90"), use_listing("list_products"), pytest.raises(ValueError, match="deterministic"):
            chosen(x, W_enc)
    finally:
        torch.use_deterministic_algorithms(False)
    with config.override("sm_90"):
        assert chosen(x, W_enc).startswith("list_products: ")


def test_fp32_products_follow_pytorchs_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library serves fp32 only where no flag allows TF32 there; flags are left alone."""
    from fastsae_kernels.gpu.list_products import refuses

    x, W_enc = torch.zeros(4, 8), torch.zeros(8, 16)
    before = torch.get_float32_matmul_precision()
    assert refuses(x, W_enc) == ""
    try:
        torch.set_float32_matmul_precision("high")
        assert "flags ask for TF32" in refuses(x, W_enc)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "shape", [(8192, 65536, 2), (8192, 131072, 2), (64, 65536, 2), (1, 131072, 4), (500_000, 65536, 2)]
)
def test_chunks_stay_small(shape: tuple[int, int, int]) -> None:
    from fastsae_kernels.gpu import list_products

    n_tokens, d_sae, element_size = shape
    rows, width = list_products.chunk_shape(n_tokens, d_sae, element_size, 24 * 2**20)
    assert rows * width * 4 <= 24 * 2**20
    assert rows * width * 4 < 0.03 * n_tokens * d_sae * element_size
    assert rows == min(rows, n_tokens)
    assert width % 128 == 0


def test_narrowest_key_of_the_table_serves() -> None:
    from fastsae_kernels.gpu.config import find_configs, launch_config, override

    def tile(number: int) -> dict[str, int]:
        return {"BLOCK_B": number}

    keys = ("16", "16 odd", "16 n<=32", "16 n<=32 odd", "32", "32 n<=16")
    half, full = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    with override({"encode": {key: tile(number) for number, key in enumerate(keys)}}):
        for like, options, expected_key in (
            (half, {}, "16"),
            (half, {"odd": True}, "16 odd"),
            (half, {"n_tokens": 33}, "16"),
            (half, {"n_tokens": 7}, "16 n<=32"),
            (half, {"n_tokens": 32, "odd": True}, "16 n<=32 odd"),
            (half, {"n_tokens": 64, "odd": True}, "16 odd"),
            (full, {"n_tokens": 7}, "32 n<=16"),
            (full, {"n_tokens": 17, "odd": True}, "32"),
        ):
            assert find_configs("encode", like, **options) == [tile(keys.index(expected_key))], (options, expected_key)
        assert find_configs("nothing", half) == []
        assert launch_config("encode", half, odd=True) == tile(1)
        with pytest.raises(KeyError, match="nothing: expected in the launch table"):
            launch_config("nothing", half)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_103", "gfx942", "sm_86"])
def test_every_table_serves_every_batch(arch: str) -> None:
    """Each dtype, number of tokens and depth finds tiles, and no row of the table names a kernel without them."""
    from fastsae_kernels.gpu import config
    from fastsae_kernels.gpu.choice import from_table, tiles_of

    with config.override(arch):
        for dtype in (torch.bfloat16, torch.float32):
            for n_tokens in (1, 16, 17, 33, 65, 4096):
                for d_in in (2304, 1000, 7):
                    x = torch.empty(n_tokens, d_in, dtype=dtype, device="meta")
                    W_enc = torch.empty(4096, d_in, dtype=dtype, device="meta").t()
                    assert tiles_of("list_pointers", x)
                    assert "has no tiles" not in from_table(x, W_enc).why


def test_too_old_a_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import config

    monkeypatch.setattr(config, "capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or newer, Tesla T4 has 7\.5"):
        config._arch_of.__wrapped__(0)


def test_too_old_a_triton_is_one_clear_error() -> None:
    from fastsae_kernels.gpu.config import check_triton

    for version in ("3.2.0", "3.4.0+git1a2b"):
        with pytest.raises(RuntimeError, match=r"need triton 3\.5 or newer .* got 3\.[24]"):
            check_triton(version)
    for version in ("3.5.0", "3.10.1", "4.0.0rc1"):
        check_triton(version)
