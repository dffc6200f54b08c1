"""sparsify's `Trainer`, with its language model, before and after `fastsae.accelerate`.

    python examples/sparsify_training.py --d-in 768 --latents 16384 --context 256 --steps 4

The model is a random GPT-2 of two layers, so that nothing is downloaded; its own forward pass is in both times.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import transformers
from common import show, sizes, timed
from sparsify import SparseCoderConfig, TrainConfig, Trainer

import fastsae


def trainer_of(size: Any, folder: str) -> Trainer:
    torch.manual_seed(0)
    settings = transformers.GPT2Config(vocab_size=500, n_positions=size.context, n_embd=size.d_in, n_layer=2, n_head=2)
    rows = torch.randint(0, 500, (size.steps * size.sequences, size.context)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": rows}).with_format("torch")
    config = TrainConfig(
        SparseCoderConfig(num_latents=size.latents, k=size.k),
        batch_size=size.sequences,
        layers=[0],
        log_to_wandb=False,
        save_every=10**9,
        save_dir=folder,
        run_name="example",
    )
    return Trainer(config, data, transformers.GPT2LMHeadModel(settings))


def main() -> None:
    size = sizes(__doc__, d_in=768, latents=16384, k=64, context=256, sequences=8, steps=4)
    with TemporaryDirectory() as folder:
        plain = trainer_of(size, str(Path(folder, "before")))
        _, before = timed(plain.fit)

        trainer = trainer_of(size, str(Path(folder, "after")))
        handle = fastsae.accelerate(trainer)  # the one line
        _, after = timed(trainer.fit)
    (theirs,), (ours,) = plain.saes.values(), trainer.saes.values()
    show(f"{size.steps} steps of sparsify", before, after, (ours.W_dec - theirs.W_dec).abs().median(), handle)


if __name__ == "__main__":
    main()
