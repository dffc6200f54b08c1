"""SAELens' trainer before and after `fastsae.accelerate`: the same steps, sooner.

python examples/saelens_training.py --d-in 768 --d-sae 16384 --tokens 4096 --steps 4
"""

from __future__ import annotations

from typing import Any

import torch
from common import activations, show, sizes, timed
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import fastsae


def trainer_of(size: Any, batches: list[torch.Tensor]) -> SAETrainer:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k))
    config = SAETrainerConfig(
        total_training_samples=size.steps * size.tokens,
        train_batch_size_samples=size.tokens,
        lr=3e-4,
        lr_end=3e-5,
    )
    return SAETrainer(config, sae, iter(batches))


def main() -> None:
    size = sizes(__doc__, d_in=768, d_sae=16384, k=64, tokens=4096, steps=4)
    batches = [activations(size.tokens, size.d_in, seed) for seed in range(size.steps)]

    plain = trainer_of(size, batches)
    theirs, before = timed(plain.fit)

    trainer = trainer_of(size, batches)
    handle = fastsae.accelerate(trainer, optimizer=True)  # the one line
    ours, after = timed(trainer.fit)

    show(f"{size.steps} steps of SAELens' trainer", before, after, (ours.W_dec - theirs.W_dec).abs().max(), handle)
    handle.undo()  # the trainer, its SAE and its optimiser are SAELens' own again


if __name__ == "__main__":
    main()
