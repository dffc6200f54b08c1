"""SAELens' own tools start on the folder of a run: its model loader, its activations store, its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastsae.data.activations import ResidualStream
from fastsae.sae import SparseAutoencoder
from fastsae.train.config import TrainConfig
from fastsae.train.run import train

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install sae-lens)")


@pytest.fixture(scope="module")
def folder(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that leaves the first position out."""
    output = tmp_path_factory.mktemp("run") / "sae"
    config = TrainConfig(
        model=str(tiny_model),
        dataset=str(chats),
        eval_dialogues=8,
        d_sae=64,
        tokens=64 * 24,
        batch_size=64,
        buffer_tokens=512,
        forward_tokens=256,
        max_length=64,
        init_l0=8,
        target_l0=4,
        layer=1,
    )
    train(config, output, progress=False)
    return output


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The language model as SAELens loads it by the metadata alone."""
    from sae_lens.load_model import load_model

    known = sae_lens.SAE.load_from_disk(str(folder)).cfg.metadata
    return load_model(known.model_class_name, known.model_name, device="cpu", hook_names=[known.hook_name])


@pytest.fixture
def dataset() -> Any:
    datasets = pytest.importorskip("datasets")
    g = torch.Generator().manual_seed(0)
    return datasets.Dataset.from_dict({"tokens": torch.randint(0, 500, (40, 64), generator=g).tolist()})


def test_the_metadata_say_where_the_sae_belongs(folder: Path, tiny_model: Path, chats: Path) -> None:
    known = json.loads((folder / "cfg.json").read_text())["metadata"]
    expected = {
        "model_name": str(tiny_model),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.1",
        "dataset_path": str(chats),
        "context_size": 64,
        "prepend_bos": False,
        "seqpos_slice": [1, None],
        "exclude_special_tokens": False,
        "disable_concat_sequences": True,
    }
    assert {name: known[name] for name in expected} == expected


def test_the_hook_is_the_residual_stream_that_was_trained_on(folder: Path, model: Any) -> None:
    input_ids = torch.randint(0, 500, (2, 16))
    _, cache = model.run_with_cache(input_ids, names_filter=["model.layers.1"])
    expected = ResidualStream(model.model, 1)(input_ids, torch.ones_like(input_ids))
    torch.testing.assert_close(cache["model.layers.1"], expected)


@pytest.mark.parametrize("kind", ["theirs", "ours"])
def test_an_activations_store_starts_on_either_object(folder: Path, model: Any, dataset: Any, kind: str) -> None:
    sae: Any = sae_lens.SAE.load_from_disk(str(folder)) if kind == "theirs" else SparseAutoencoder.load(folder)
    store = sae_lens.ActivationsStore.from_sae(
        model,
        sae,
        dataset,
        streaming=False,
        store_batch_size_prompts=4,
        n_batches_in_buffer=2,
        train_batch_size_tokens=32,
    )
    batch = next(iter(store))
    assert batch.shape[-1] == sae.cfg.d_in
    assert sae(batch).isfinite().all()
    assert store.hook_name == "model.layers.1"
    assert store.get_activations(store.get_batch_tokens()).shape[1] == 63  # without the first position


def test_saelens_evaluates_either_object_to_the_same(folder: Path, model: Any, dataset: Any) -> None:
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    config = get_eval_everything_config(
        batch_size_prompts=2, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1
    )
    results = []
    for sae in (sae_lens.SAE.load_from_disk(str(folder)), SparseAutoencoder.load(folder)):
        store = sae_lens.ActivationsStore.from_sae(
            model, sae, dataset, streaming=False, store_batch_size_prompts=2, n_batches_in_buffer=2
        )
        metrics, by_feature = run_evals(sae, store, model, ActivationScaler(), config)
        results.append({**metrics, "by feature": by_feature})
    assert {"model_performance_preservation", "reconstruction_quality", "sparsity"} <= results[0].keys()
    compare(results)


def compare(results: list[dict[str, dict[str, Any]]]) -> None:
    for group, values in results[0].items():
        for name, value in values.items():
            expected, got = torch.tensor(value).double(), torch.tensor(results[1][group][name]).double()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{group}: {name}")


def test_saebench_evaluates_either_object_to_the_same(folder: Path, model: Any, dataset: Any) -> None:
    main = pytest.importorskip("sae_bench.evals.core.main", reason="sae-bench is not installed (pip install sae-bench)")
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    config = main.CoreEvalConfig(
        batch_size_prompts=2,
        n_eval_reconstruction_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    results = []
    for sae in (sae_lens.SAE.load_from_disk(str(folder)), SparseAutoencoder.load(folder)):
        load_and_format_sae("run", sae, "cpu")  # writes what it needs to cfg
        store = sae_lens.ActivationsStore.from_sae(
            model, sae, dataset, streaming=False, store_batch_size_prompts=2, n_batches_in_buffer=2
        )
        metrics, by_feature = main.run_evals(sae, store, model, config)
        results.append({**metrics, "by feature": by_feature})
    compare(results)


def test_saedashboard_sees_the_same_features_in_either_object(folder: Path) -> None:
    generator = pytest.importorskip("sae_dashboard.feature_data_generator", reason="sae-dashboard is not installed")
    x = 20 * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for sae in (sae_lens.SAE.load_from_disk(str(folder)), SparseAutoencoder.load(folder)):
        sae.fold_W_dec_norm()
        whole = sae.encode(x)
        with generator.FeatureMaskingContext(sae, [5, 60, 7]), torch.inference_mode():
            found.append(sae.encode(x))
        torch.testing.assert_close(found[-1], whole[..., [5, 60, 7]])
        torch.testing.assert_close(sae.encode(x), whole)
    assert (found[0] > 0).any()
    torch.testing.assert_close(found[1], found[0])


def test_the_sparsity_is_the_one_of_the_held_out_tokens(folder: Path) -> None:
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sparsity.shape == (64,)
    share = 10 ** sparsity.double()
    assert share.sum().item() == pytest.approx(metrics["l0"], rel=1e-4)
    assert (share < 1e-9).double().mean().item() == pytest.approx(metrics["dead_share"])
