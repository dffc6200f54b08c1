"""SAELens' training runner from its own command line, before and after `accelerate(sae_lens)`: the same files."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from saelens_problem import close, sae_lens
from safetensors.torch import load_file

from fastsae import accelerate
from fastsae.peers.handle import Handle

_run_cli = pytest.importorskip("sae_lens.llm_sae_training_runner")._run_cli

N_STEPS, N_TOKENS = 12, 512
OPTIONS = f"""
    --model_class_name AutoModelForCausalLM --hook_name model.layers.1 --context_size 32 --prepend_bos False
    --d_in 16 --d_sae 256 --training_tokens {N_STEPS * N_TOKENS} --train_batch_size_tokens {N_TOKENS}
    --n_batches_in_buffer 16 --store_batch_size_prompts 8 --n_batches_for_norm_estimate 2
    --normalize_activations expected_average_only_in --lr 1e-3 --lr_warm_up_steps 2 --lr_decay_steps 3
    --dead_feature_window 4 --feature_sampling_window 5 --nolog_to_wandb --noverbose --seed 7
"""
KINDS = {
    "jumprelu": "--architecture jumprelu --l0_coefficient 0.1 --jumprelu_bandwidth 0.5",
    "standard": "--architecture standard --l1_coefficient 0.1",
    "topk": "--architecture topk --k 8",
    "batchtopk": "--architecture batchtopk --k 8 --n_checkpoints 1",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a data set of random sentences."""
    folder = tmp_path_factory.mktemp("texts")
    words = "the cat sat on a mat while rain fell over seven green hills and nobody asked why".split()
    draw = random.Random(0)
    rows = (json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(200))
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def handlers_of_signals_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(kind: str, model: Path, texts: Path, folder: Path, more: str = "") -> Path:
    places = f"--model_name {model} --dataset_path {texts} --output_path {folder} --checkpoint_path {folder / 'kept'}"
    torch.manual_seed(0)  # from which the runner draws the initial weights; its `--seed` is that of the activations
    _run_cli(f"{places} {OPTIONS} {KINDS[kind]} {more}".split())
    return folder


def assert_same_files(ours: Path, theirs: Path) -> None:
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert close(a[key], value, 1e-5), key
    a, b = (json.loads((folder / "cfg.json").read_text()) for folder in (ours, theirs))
    assert a == b


def assert_all_fused(handle: Handle, n: int) -> None:
    assert handle.tally.fused == {"training_forward_pass": n, "_train_step": n}
    assert not handle.tally.left


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_writes_the_same_sae(kind: str, tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    theirs = run(kind, tiny_model, texts, tmp_path / "theirs")
    with accelerate(sae_lens) as handle:
        ours = run(kind, tiny_model, texts, tmp_path / "ours")
    assert_all_fused(handle, N_STEPS)
    assert_same_files(ours, theirs)
    assert float(load_file(theirs / "sparsity.safetensors")["sparsity"].max()) > -3  # log10: features fire


def test_a_run_goes_on_accelerated_from_the_peers_checkpoint(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    run("batchtopk", tiny_model, texts, tmp_path / "first")
    (checkpoint,) = (tmp_path / "first" / "kept").glob("*/*/")
    go_on = f"--resume_from_checkpoint {checkpoint}"
    theirs = run("batchtopk", tiny_model, texts, tmp_path / "theirs", go_on)
    with accelerate(sae_lens) as handle:
        ours = run("batchtopk", tiny_model, texts, tmp_path / "ours", go_on)
    assert 0 < handle.tally.fused["_train_step"] < N_STEPS
    assert_same_files(ours, theirs)
