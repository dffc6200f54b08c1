"""The model's next-token loss with the SAE spliced in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae.evaluate.metrics import Metrics, ratio

_CHUNK_ELEMENTS = 2**20  # of log-probabilities held at once in fp32: stays in a CPU's cache, fills a GPU


LOSSES = ("targets", "ce", "ce_spliced", "ce_zero", "kl")
"""What is known of a token as the one that is predicted: that it is (1 or 0), the cross-entropies of the clean model, with the
reconstruction and with zeros, and KL(clean || reconstruction), all in nats; 0 for the first token of a dialogue."""


def cross_entropies(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`[N]` fp64, -log p of each of the N real tokens; 0 for the first of a dialogue.

    Args:
        logits: `[B, T, vocabulary]`.
        input_ids: `[B, T]`, padded on the right.
        attention_mask: `[B, T]`.
    """
    found = torch.zeros(int(attention_mask.sum()), dtype=torch.float64, device=logits.device)
    for index, targets, tokens in _targets(input_ids, attention_mask, logits):
        found[tokens] = -_log_probs(logits, index).gather(1, targets)[:, 0].double()
    return found


def token_losses(clean: Tensor, spliced: Tensor, ce_zero: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`[len(LOSSES), N]` fp64, the losses of each of the N real tokens.

    Args:
        clean: `[B, T, vocabulary]` logits of the model as it is.
        spliced: The same with the reconstruction in the place of the activations.
        ce_zero: `[N]`, `cross_entropies` with zeros there.
        input_ids: `[B, T]`, padded on the right.
        attention_mask: `[B, T]`.
    """
    found = torch.zeros(len(LOSSES), len(ce_zero), dtype=torch.float64, device=clean.device)
    found[3] = ce_zero
    for index, targets, tokens in _targets(input_ids, attention_mask, clean):
        log_p, log_q = _log_probs(clean, index), _log_probs(spliced, index)
        found[0, tokens] = 1
        found[1, tokens] = -log_p.gather(1, targets)[:, 0].double()
        found[2, tokens] = -log_q.gather(1, targets)[:, 0].double()
        found[4, tokens] = log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(1, dtype=torch.float64)
    return found


class LossSums:
    """Sums of next-token losses over every target token: each real token but the first of its dialogue."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(LOSSES), dtype=torch.float64)

    def add(self, losses: Tensor) -> None:
        """Adds `[len(LOSSES), N]`, from `token_losses`."""
        self.sums += losses.sum(1).cpu()

    def metrics(self) -> Metrics:
        """Losses in nats per token, None where one is undefined.

            ce                  mean of -log p(token | tokens before), over all targets
            ce_spliced          the same with the reconstruction in place of the activations
            ce_zero             the same with zeros in its place
            delta_loss_percent  100 (ce_spliced - ce) / ce
            recovered           (ce_zero - ce_spliced) / (ce_zero - ce): 1 for a perfect SAE, 0 for one that gives zeros
            kl                  mean over targets of KL(p || p spliced)

        Attention sinks keep their own activation in both replacements.
        """
        count, clean, spliced, zero, kl = self.sums.tolist()
        return {
            "ce": ratio(clean, count),
            "ce_spliced": ratio(spliced, count),
            "ce_zero": ratio(zero, count),
            "delta_loss_percent": ratio(100 * (spliced - clean), clean),
            "recovered": ratio(zero - spliced, zero - clean),
            "kl": ratio(kl, count),
        }


def _targets(input_ids: Tensor, attention_mask: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of (flat index of the predicting position `[n]`, token that follows `[n, 1]`, its place among real tokens)."""
    input_ids, real = input_ids.to(logits.device), attention_mask.to(logits.device, torch.bool)
    rows, columns = (real[:, 1:] & real[:, :-1]).nonzero(as_tuple=True)
    places = real.flatten().cumsum(0).view(real.shape) - 1
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for row, column in zip(rows.split(size), columns.split(size), strict=True):
        if row.numel():
            following = row, column + 1
            yield row * input_ids.shape[1] + column, input_ids[following][:, None], places[following]


def _log_probs(logits: Tensor, index: Tensor) -> Tensor:
    """`[n, vocabulary]` fp32 log-probabilities at the flat positions `index`."""
    return logits.reshape(-1, logits.shape[-1])[index].float().log_softmax(-1)
