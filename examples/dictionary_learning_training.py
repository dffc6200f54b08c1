"""`trainSAE` of dictionary_learning with an accelerated trainer class: only the class in the configuration changes.

python examples/dictionary_learning_training.py --d-in 768 --d-sae 16384 --tokens 4096 --steps 4
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import activations, show, sizes, timed
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.training import trainSAE

import fastsae


def trained(cls: Any, size: Any, batches: list[torch.Tensor], folder: Path) -> torch.Tensor:
    torch.manual_seed(0)
    trainer = {
        "trainer": cls,
        "dict_class": BatchTopKSAE,
        "activation_dim": size.d_in,
        "dict_size": size.d_sae,
        "k": size.k,
        "steps": size.steps,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "lr": 3e-4,
        "warmup_steps": 1,
    }
    trainSAE(batches, [trainer], size.steps, save_dir=str(folder), device="cpu")
    weights: dict[str, torch.Tensor] = torch.load(folder / "trainer_0" / "ae.pt")
    return weights["decoder.weight"]


def main() -> None:
    size = sizes(__doc__, d_in=768, d_sae=16384, k=64, tokens=4096, steps=4)
    batches = [activations(size.tokens, size.d_in, seed) for seed in range(size.steps + 1)]
    with TemporaryDirectory() as folder:
        theirs, before = timed(lambda: trained(BatchTopKTrainer, size, batches, Path(folder, "before")))
        handle = fastsae.accelerate(BatchTopKTrainer)
        ours, after = timed(lambda: trained(handle.accelerated, size, batches, Path(folder, "after")))
    show(f"trainSAE of {size.steps} steps", before, after, (ours - theirs).abs().max(), handle)


if __name__ == "__main__":
    main()
