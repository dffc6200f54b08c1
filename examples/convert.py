"""An SAE in Gemma Scope's file becomes one of SAELens and one of dictionary_learning: the same function, checked.

    python examples/convert.py --d-in 256 --d-sae 2048

`fastsae convert SOURCE TARGET --to FORMAT --check` does the same on the command line.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import activations, sizes

import fastsae
from fastsae.peers import formats


def write_gemma_scope(path: Path, d_in: int, d_sae: int) -> None:
    """A random SAE as the releases of Gemma Scope hold them."""
    path.parent.mkdir(parents=True)
    draw = np.random.default_rng(0)
    W_dec = draw.normal(size=(d_sae, d_in)).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    weights = {
        "W_enc": W_dec.T,
        "b_enc": np.zeros(d_sae, np.float32),
        "W_dec": W_dec,
        "b_dec": np.zeros(d_in, np.float32),
    }
    np.savez(path, threshold=np.full(d_sae, 0.5, np.float32), **weights)


def main() -> None:
    size = sizes(__doc__, d_in=256, d_sae=2048)
    with TemporaryDirectory() as folder:
        source = Path(folder, "layer_20/width_2k/average_l0_50/params.npz")
        write_gemma_scope(source, size.d_in, size.d_sae)
        sae = formats.read(source)
        for target in ("saelens", "dictionary-learning"):
            written = formats.write(sae, Path(folder, target), target)
            found = formats.difference(sae, formats.read(Path(folder, target)))
            print(f"{target}: largest difference {found['sae_out']:.2g}", *written.notes, sep="\n    ")
        loaded = fastsae.SparseAutoencoder.load(source)  # any of them runs without being converted, too
        with torch.no_grad():
            l0 = (loaded.encode(activations(64, size.d_in, seed=0)) > 0).sum(dim=1).float().mean()
        print(f"{type(loaded).__name__}: {l0:.1f} features are active on a token")


if __name__ == "__main__":
    main()
