"""SAEs whose features several processes share: forward and every gradient against the whole SAE in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from problems import assert_within_budget
from processes import run
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

import fastsae
from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
D_IN = 12
# name: class, options, d_sae, tokens, options of the training pass
JUMPRELU: dict[str, Any] = {"bandwidth": 0.5, "init_threshold": 0.3}
CASES: dict[str, tuple[type[SparseAutoencoder], dict[str, Any], int, int, dict[str, Any]]] = {
    "step": (FusedJumpReLUSAE, JUMPRELU, 37, 50, {"l0_coefficient": 0.3}),
    "quadratic": (FusedJumpReLUSAE, JUMPRELU, 37, 50, {"sparsity": "quadratic", "target_l0": 4.0}),
    "tanh": (FusedJumpReLUSAE, JUMPRELU, 37, 50, {"sparsity": "tanh"}),
    "ste_to_input": (FusedJumpReLUSAE, {**JUMPRELU, "ste_to_input": True}, 37, 50, {}),
    "pre_bias": (FusedJumpReLUSAE, {**JUMPRELU, "apply_b_dec_to_input": True}, 37, 50, {}),
    "log_threshold": (FusedJumpReLUSAE, {**JUMPRELU, "log_threshold": True}, 37, 50, {}),
    "pre_act": (FusedJumpReLUSAE, {**JUMPRELU, "apply_b_dec_to_input": True}, 37, 50, {"dead": 5}),
    "relu": (FusedReLUSAE, {}, 37, 50, {"l1_coefficient": 0.1}),
    "relu_pre_bias": (FusedReLUSAE, {"apply_b_dec_to_input": True}, 37, 50, {}),
    "topk": (FusedTopKSAE, {"k": 5}, 37, 50, {}),
    "topk_no_rescale": (FusedTopKSAE, {"k": 5, "rescale_acts_by_decoder_norm": False}, 37, 50, {}),
    "topk_k_of_a_part": (FusedTopKSAE, {"k": 20}, 37, 50, {}),
    "topk_aux": (FusedTopKSAE, {"k": 5}, 37, 50, {"dead": 5}),
    "topk_aux_choice": (FusedTopKSAE, {"k": 5}, 37, 50, {"dead": 15}),
    "batchtopk": (FusedBatchTopKSAE, {"k": 5}, 37, 50, {}),
    "batchtopk_aux": (FusedBatchTopKSAE, {"k": 5, "apply_b_dec_to_input": False}, 37, 50, {"dead": 15}),
    "batchtopk_all": (FusedBatchTopKSAE, {"k": 37}, 37, 50, {}),
    "one_token": (FusedJumpReLUSAE, JUMPRELU, 37, 1, {}),
    "no_token": (FusedJumpReLUSAE, JUMPRELU, 37, 0, {}),
    "few_features": (FusedJumpReLUSAE, {**JUMPRELU, "apply_b_dec_to_input": True}, 3, 50, {}),
    "few_features_topk": (FusedTopKSAE, {"k": 2}, 3, 50, {}),
    "few_features_batchtopk": (FusedBatchTopKSAE, {"k": 2}, 3, 50, {"dead": 1}),
    "few_features_pre_act": (FusedJumpReLUSAE, {**JUMPRELU, "apply_b_dec_to_input": True}, 3, 50, {"dead": 1}),
    "few_features_no_token": (FusedJumpReLUSAE, {**JUMPRELU, "apply_b_dec_to_input": True}, 3, 0, {"dead": 1}),
    "few_features_no_token_topk": (FusedTopKSAE, {"k": 2}, 3, 0, {"dead": 1}),
    "few_features_no_token_batchtopk": (FusedBatchTopKSAE, {"k": 2}, 3, 0, {}),
    "no_token_topk": (FusedTopKSAE, {"k": 5}, 37, 0, {}),
    "silent_part": (FusedTopKSAE, {"k": 5}, 37, 50, {"dead": 5}),
    "all_dead": (FusedJumpReLUSAE, {"bandwidth": 0.5, "init_threshold": 1e3}, 37, 50, {"dead": 37}),
    "ties": (FusedTopKSAE, {"k": 5, "rescale_acts_by_decoder_norm": False}, 37, 50, {"ties": True}),
    "batch_ties": (FusedBatchTopKSAE, {"k": 5, "rescale_acts_by_decoder_norm": False}, 37, 50, {"ties": True}),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def made(name: str, dtype: torch.dtype, **more: Any) -> SparseAutoencoder:
    cls, options, d_sae, _, training = CASES[name]
    torch.manual_seed(1)
    sae = cls(D_IN, d_sae, **options, dtype=dtype, **more)
    if not more:
        with torch.no_grad():
            for p in sae.parameters():
                p += 0.1 * torch.randn_like(p) if not training.get("ties") else 0
            if training.get("ties"):  # whole numbers, whose sums are exact in any order, and few directions
                sae.W_enc.copy_((40 * sae.W_enc[:, :4]).round().repeat(1, 10)[:, : sae.d_sae])
            if "few_features" not in name:
                sae.b_enc[: 13 if "all_dead" not in name else None] -= 2.0  # those of the first process hardly fire
            if name == "silent_part":
                sae.b_enc[:19] = -1e3
    return sae


def tokens(name: str, dtype: torch.dtype) -> Tensor:
    n_tokens, training = CASES[name][3:]
    generator = torch.Generator().manual_seed(7)
    if training.get("ties"):
        return torch.randint(-1, 2, (n_tokens, D_IN), generator=generator).to(dtype)
    return torch.randn(n_tokens, D_IN, generator=generator, dtype=torch.float64).to(dtype)


def dead_of(name: str, d_sae: int) -> Tensor | None:
    n_dead = CASES[name][4].get("dead")
    return None if n_dead is None else torch.arange(d_sae) < n_dead  # on the first processes alone


def trained(sae: SparseAutoencoder, name: str, x: Tensor, dead: Tensor | None) -> dict[str, Tensor]:
    """Loss, counts and every gradient of one training pass."""
    options = {key: value for key, value in CASES[name][4].items() if key not in ("dead", "ties")}
    if dead is not None:
        options["dead_mask"] = dead
    x = x.clone().requires_grad_()
    output = sae.training_forward(x, **options)  # type: ignore[operator]
    output.loss.backward()
    found = {f"grad {key}": p.grad for key, p in sae.named_parameters()} | {
        f"loss {k}": v for k, v in output.losses.items()
    }
    found |= {"grad x": x.grad, "residual": output.residual, "loss": output.loss, "l0": output.l0, "fvu": output.fvu}
    found["counts"] = output.feature_counts
    if isinstance(sae, FusedBatchTopKSAE):
        found["topk_threshold"] = sae.topk_threshold
    return {key: torch.zeros(0) if value is None else value.detach().clone() for key, value in found.items()}


def with_all(sae: SparseAutoencoder, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a process has found, with the parts of the others."""
    sharding = sae.sharding
    assert sharding is not None
    gathered = {}
    for key, value in found.items():
        name = key.removeprefix("grad ")
        gathered[key] = sharding.whole(name, value) if key.startswith("grad ") else value
    gathered["counts"] = sharding.whole("b_enc", found["counts"])
    return gathered


def inference(sae: SparseAutoencoder, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        acts = sae.encode_sparse(x).packed()
        top = sae.encode_topk(x, 2)
        return {
            "forward": sae(x), "indices": acts.indices, "values": acts.values, "row_offsets": acts.row_offsets.long(),
            "encode": sae.encode(x), "decode": sae.decode(acts), "dense decode": sae.decode(sae.encode(x)),
            "top": top.values, "top indices": top.indices, "features": sae.encode_features(x, [2, 0, 2]),
        }  # fmt: skip


def sharded(names: list[str], dtype: str, chunks: int) -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("feature",))
    results = {}
    for name in names:
        sae = fastsae.shard(made(name, DTYPES[dtype]), mesh, overlap_chunks=chunks)
        assert sae.sharding is not None
        dead = dead_of(name, sae.d_sae)
        dead = None if dead is None else dead[sae.sharding.start : sae.sharding.end]
        x = tokens(name, DTYPES[dtype])
        results[name] = with_all(sae, trained(sae, name, x, dead)) | inference(sae, x)
    return results


@pytest.mark.parametrize(("n_processes", "chunks"), [(2, 1), (4, 1), (3, 3)])
def test_parts_give_the_whole_in_float64(n_processes: int, chunks: int, tmp_path: Path) -> None:
    names = list(CASES)
    ranks = run(sharded, n_processes, tmp_path, names, "float64", chunks)
    for name in names:
        sae, x = made(name, torch.float64), tokens(name, torch.float64)
        want = trained(sae, name, x, dead_of(name, sae.d_sae)) | inference(sae, x)
        for rank in ranks:
            assert rank[name].keys() == want.keys()
            for key, value in want.items():
                got = rank[name][key]
                torch.testing.assert_close(
                    got, value, rtol=1e-11, atol=1e-12, equal_nan=True, msg=lambda t, n=name, k=key: f"{n}: {k}: {t}"
                )
                assert torch.equal(got.nan_to_num(), ranks[0][name][key].nan_to_num()), f"{name}: {key} differs"


def test_parts_are_as_exact_as_the_whole_in_float32(tmp_path: Path) -> None:
    """At most twice the error of the whole SAE, against float64."""
    names = ["step", "quadratic", "tanh", "pre_bias", "relu", "topk", "batchtopk"]
    ranks = run(sharded, 2, tmp_path, names, "float32", 1)
    for name in names:
        whole, exact = made(name, torch.float32), made(name, torch.float32).double()
        if isinstance(exact, FusedJumpReLUSAE):
            exact.threshold.data = exact.threshold.data.double()
        x = tokens(name, torch.float32)
        truth, eager = trained(exact, name, x.double(), None), trained(whole, name, x, None)
        for key, value in truth.items():
            got = ranks[0][name][key]
            if key == "counts":
                assert torch.equal(got, value)
            else:
                assert_within_budget(f"{name}: {key}", got.double(), value.double(), eager[key].double())


def in_sixteen_bits(name: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("feature",))
    found = {}
    for way, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        sae = fastsae.shard(made(name, torch.float32), mesh, reduce_dtype=dtype)
        assert sae.sharding is not None
        x = tokens(name, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found[f"autocast, {way}"] = with_all(sae, trained(sae, name, x, None))
        found[way] = with_all(sae, trained(sae, name, x, None))
        found[f"sent, {way}"] = dict(sae.sharding.features.traffic)  # type: ignore[assignment]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["step", "topk", "few_features"])
def test_sixteen_bits(name: str, tmp_path: Path) -> None:
    """Parts that travel in bfloat16 are rounded twice, whatever the number of processes; those of products are, too."""
    ranks: list[dict[str, Any]] = run(in_sixteen_bits, 3, tmp_path, name)
    x = tokens(name, torch.float32)
    want = trained(made(name, torch.float32), name, x, None)["residual"]
    with torch.autocast("cpu", torch.bfloat16):
        of_products = (trained(made(name, torch.float32), name, x, None)["residual"].float() - want).norm()
    of_parts = 2**-8 * want.norm()
    budgets = {"autocast, float32": of_products, "autocast, bfloat16": of_products + of_parts, "bfloat16": of_parts}
    for way, budget in budgets.items():  # whichever way, gates may open that were closed
        error = (ranks[0][way]["residual"].float() - want).norm()
        assert 0 < error < 1.5 * budget, f"{way}: {error} of {budget}"
        for rank in ranks[1:]:
            assert all(torch.equal(rank[way][key], value) for key, value in ranks[0][way].items() if value.numel())
    sent = {way: ranks[0][f"sent, {way}"]["reconstruction"] for way in ("float32", "bfloat16")}
    assert sent["bfloat16"] < 0.6 * sent["float32"]


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    assert run(refused, 2, tmp_path) == [[True] * 8] * 2


def parametrized() -> SparseAutoencoder:
    sae = made("step", torch.float32)
    torch.nn.utils.parametrize.register_parametrization(sae, "W_dec", torch.nn.Identity())
    return sae


def refused() -> list[bool]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("feature",))
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("layers",))
    shared, whole = fastsae.shard(made("step", torch.float32), mesh), made("step", torch.float32)
    attempts: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "k: expected None", lambda: fastsae.shard(FusedJumpReLUSAE(4, 8, k=2), mesh)),
        (ValueError, "k: expected None", lambda: FusedReLUSAE(4, 8, k=2, mesh=mesh)),
        (fastsae.UsageError, "mesh: expected", lambda: fastsae.shard(whole, other)),
        (
            fastsae.UsageError,
            "reduce_dtype: expected",
            lambda: fastsae.shard(whole, mesh, reduce_dtype=torch.half),
        ),
        (
            fastsae.UsageError,
            "overlap_chunks: expected",
            lambda: fastsae.shard(whole, mesh, overlap_chunks=0),
        ),
        (ValueError, "remove the parametrization", lambda: fastsae.shard(parametrized(), mesh)),
        (ValueError, "shared already", lambda: fastsae.shard(shared, mesh)),
        (ValueError, "feature_weights: expected", lambda: shared.feature_weights([0])),
    ]
    found = []
    for kind, message, attempt in attempts:
        with pytest.raises(kind, match=message):
            attempt()
        found.append(True)
    return found


def drawn() -> dict[str, Tensor]:
    group = distributed.group.WORLD
    found = {}
    for cls, options in ((FusedJumpReLUSAE, {}), (FusedTopKSAE, {"k": 2})):
        torch.manual_seed(3)
        sae = cls(8, 9001, mesh=group, **options)  # type: ignore[arg-type]
        found[cls.__name__] = dict(fastsae.unshard(sae).state_dict())
    return found  # type: ignore[return-value]


def test_a_new_sae_has_the_weights_of_one_that_is_not_shared(tmp_path: Path) -> None:
    ranks: list[dict[str, Any]] = run(drawn, 2, tmp_path)
    for cls, options in ((FusedJumpReLUSAE, {}), (FusedTopKSAE, {"k": 2})):
        torch.manual_seed(3)
        want = cls(8, 9001, **options).state_dict()  # type: ignore[arg-type]
        for rank in ranks:
            assert rank[cls.__name__].keys() == want.keys()
            assert all(torch.equal(rank[cls.__name__][name], value) for name, value in want.items())


def in_rows(folder: str) -> dict[str, Any]:
    """One SAE in two processes that see other tokens."""
    rank, found = distributed.get_rank(), {}
    sae = made("batchtopk", torch.float64)
    sae(tokens("batchtopk", torch.float64)).sum().backward()  # of a gradient of the whole nothing stays
    sae = fastsae.shard(sae, init_device_mesh("cpu", (2,), mesh_dim_names=("data",)))
    found["forgets gradients"] = all(p.grad is None for p in sae.parameters())
    assert isinstance(sae, FusedBatchTopKSAE)
    x = tokens("batchtopk", torch.float64)
    sae.calibrate_threshold_(x[:15] if rank else x[15:])
    sae.save(Path(folder, f"of-{rank}"))
    return {**found, "threshold": sae.topk_threshold.item()}


def test_processes_that_see_other_tokens_calibrate_and_save_one_sae(tmp_path: Path) -> None:
    whole = made("batchtopk", torch.float64)
    assert isinstance(whole, FusedBatchTopKSAE)
    whole.calibrate_threshold_(tokens("batchtopk", torch.float64))
    for rank in run(in_rows, 2, tmp_path, str(tmp_path)):
        assert rank["forgets gradients"]
        assert rank["threshold"] == pytest.approx(whole.topk_threshold.item(), rel=1e-12)
    assert not (tmp_path / "of-1").exists()  # two writers of one folder would mix their files
    assert FusedBatchTopKSAE.load(tmp_path / "of-0").d_sae == whole.d_sae
