"""Next-token losses: against transformers' own loss, and hand numbers."""

import math

import pytest
import torch

from fastsae.data.activations import ResidualStream
from fastsae.evaluate import losses
from fastsae.evaluate.losses import LossSums, cross_entropies, token_losses

IDS = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor([[9], [5], [1]])


@pytest.mark.parametrize("chunk", [2**20, 61 * 2])
def test_cross_entropy_is_that_of_transformers_and_ignores_padding(qwen2, monkeypatch, chunk):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)  # the chunking changes nothing
    labels = torch.where(MASK, IDS, -100)
    expected = qwen2(input_ids=IDS, attention_mask=MASK.long(), labels=labels).loss.item()
    logits = ResidualStream(qwen2, 0).logits(IDS, MASK)
    logits[~MASK] = torch.nan  # padding is never read
    sums = LossSums()
    found = token_losses(logits, logits, cross_entropies(logits, IDS, MASK), IDS, MASK)
    sums.add(found)
    metrics = sums.metrics()
    assert found[0].tolist() == [0.0, *[1.0] * 8, 0.0, *[1.0] * 4, 0.0]  # every token but the first of its dialogue
    assert (found[:, [0, 9, 14]] == 0).all()
    assert metrics["ce"] == pytest.approx(expected, rel=1e-6)
    assert metrics["ce_spliced"] == metrics["ce"]
    assert metrics["ce_zero"] == pytest.approx(metrics["ce"], rel=1e-9)
    assert metrics["kl"] == 0
    assert metrics["delta_loss_percent"] == 0
    assert metrics["recovered"] is None  # zeros did no harm: nothing to recover


def test_losses_by_hand():
    ids, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)

    def logits(p: float) -> torch.Tensor:
        """Position 0 predicts token 1 with probability p, of two."""
        return torch.tensor([[[1 - p, p], [0.5, 0.5]]]).log()

    sums = LossSums()
    sums.add(token_losses(logits(0.5), logits(0.25), cross_entropies(logits(1 / 16), ids, mask), ids, mask))
    metrics = sums.metrics()
    assert metrics["ce"] == pytest.approx(math.log(2))
    assert metrics["ce_spliced"] == pytest.approx(math.log(4))
    assert metrics["ce_zero"] == pytest.approx(math.log(16))
    assert metrics["delta_loss_percent"] == pytest.approx(100)
    assert metrics["recovered"] == pytest.approx(2 / 3)
    assert metrics["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_no_targets_give_none():
    sums = LossSums()
    logits = torch.randn(1, 1, 5)
    ids, mask = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    sums.add(token_losses(logits, logits, cross_entropies(logits, ids, mask), ids, mask))
    assert set(sums.metrics().values()) == {None}
