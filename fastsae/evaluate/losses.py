"""The model's next-token loss with the SAE spliced in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae.evaluate.metrics import Metrics, ratio

_CHUNK_ELEMENTS = 2**20  # of log-probabilities held at once in fp32: stays in a CPU's cache, fills a GPU


class LossSums:
    """Sums of next-token losses over every target token: each real token but the first of its dialogue."""

    def __init__(self) -> None:
        self.count = 0
        self.clean = self.spliced = self.zero = self.kl = 0.0

    def add_spliced(self, clean: Tensor, spliced: Tensor, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Adds the cross-entropies of both and KL(clean || spliced); logits `[B, T, vocabulary]`, ids and mask `[B, T]`."""
        sums = torch.zeros(3, dtype=torch.float64, device=clean.device)
        for index, targets in _targets(input_ids, attention_mask, clean):
            log_p, log_q = _log_probs(clean, index), _log_probs(spliced, index)
            sums[0] -= log_p.gather(1, targets).sum(dtype=torch.float64)
            sums[1] -= log_q.gather(1, targets).sum(dtype=torch.float64)
            sums[2] += log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(dtype=torch.float64)
            self.count += index.numel()
        clean_sum, spliced_sum, kl = sums.tolist()
        self.clean += clean_sum
        self.spliced += spliced_sum
        self.kl += kl

    def add_zero(self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Adds the cross-entropy with zeros spliced in, of the tokens that `add_spliced` was given."""
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for index, targets in _targets(input_ids, attention_mask, logits):
            total -= _log_probs(logits, index).gather(1, targets).sum(dtype=torch.float64)
        self.zero += total.item()

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
        ce, spliced, zero = (ratio(total, self.count) for total in (self.clean, self.spliced, self.zero))
        return {
            "ce": ce,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "delta_loss_percent": ratio(100 * (self.spliced - self.clean), self.clean),
            "recovered": ratio(self.zero - self.spliced, self.zero - self.clean),
            "kl": ratio(self.kl, self.count),
        }


def _targets(input_ids: Tensor, attention_mask: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (flat index of the predicting position `[n]`, token that follows `[n, 1]`)."""
    input_ids, real = input_ids.to(logits.device), attention_mask.to(logits.device, torch.bool)
    rows, columns = (real[:, 1:] & real[:, :-1]).nonzero(as_tuple=True)
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for row, column in zip(rows.split(size), columns.split(size), strict=True):
        if row.numel():
            yield row * input_ids.shape[1] + column, input_ids[row, column + 1][:, None]


def _log_probs(logits: Tensor, index: Tensor) -> Tensor:
    """`[n, vocabulary]` fp32 log-probabilities at the flat positions `index`."""
    return logits.reshape(-1, logits.shape[-1])[index].float().log_softmax(-1)
