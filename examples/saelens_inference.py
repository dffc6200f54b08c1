"""The pair of `encode` and `decode` of a SAELens SAE, which its evaluations and tools call, before and after accelerate.

python examples/saelens_inference.py --d-in 768 --d-sae 16384 --tokens 4096
"""

from __future__ import annotations

import torch
from common import activations, show, sizes, timed
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import fastsae


def reconstruct(sae: JumpReLUSAE, x: torch.Tensor) -> torch.Tensor:
    feature_acts = sae.encode(x)  # dense, as ever; an edit of it here would be honoured
    return sae.decode(feature_acts)


@torch.no_grad()
def main() -> None:
    size = sizes(__doc__, d_in=768, d_sae=16384, tokens=4096)
    torch.manual_seed(0)
    x = activations(size.tokens, size.d_in, seed=0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=size.d_in, d_sae=size.d_sae))  # or SAE.from_pretrained(release, sae_id)
    sae.threshold.fill_(float((x[:256] @ sae.W_enc).quantile(0.99, dim=1).mean()))  # one feature in 100 is active

    reconstruct(sae, x)  # the first call pays for memory
    theirs, before = timed(lambda: reconstruct(sae, x))
    with fastsae.accelerate(sae) as handle:
        reconstruct(sae, x)
        ours, after = timed(lambda: reconstruct(sae, x))
    per_token = (ours - theirs).abs().amax(dim=1)  # rounding opens a gate or not on a token now and then
    show("encode and decode", before, after, per_token.median(), handle)


if __name__ == "__main__":
    main()
