"""Several SAEs evaluated together: each is measured as if it were alone, with fewer passes of the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fastsae import FastsaeError, FusedJumpReLUSAE, FusedTopKSAE, UsageError
from fastsae.data import sinks
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch
from fastsae.data.special_tokens import SpecialTokens
from fastsae.data.splicing import SplicedModel
from fastsae.evaluate import evaluate, evaluate_many, reconstruction

SPECIAL = SpecialTokens({"<|im_start|>": 3, "user": 4})
FAMILIES = ["Qwen2", "Gemma2", "Mixtral"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[TokenBatch]:
    """Dialogues of several lengths, of which more than one group runs through the model."""
    monkeypatch.setattr(reconstruction, "_GROUP_TOKENS", 30)
    monkeypatch.setattr(sinks, "SAMPLE_TOKENS", 40)
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, lengths in enumerate([(12, 7, 10), (9, 9), (5, 11, 3, 6)]):
        ids = torch.randint(3, 61, (len(lengths), max(lengths)), generator=generator)
        ids[:, 1], ids[:, 2] = 3, 4
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        found.append(TokenBatch.one_per_row(torch.where(mask, ids, 0), mask, 10 * i + torch.arange(len(lengths))))
    return found


def made(model: Any) -> dict[str, tuple[Any, ResidualStream]]:
    """Two SAEs of layer 0, one of layer 2, of two kinds and widths."""
    layers = {layer: ResidualStream(model, layer) for layer in (0, 2)}
    torch.manual_seed(0)
    saes = {"a": FusedJumpReLUSAE(16, 40), "b": FusedTopKSAE(16, 64, k=3), "c": FusedJumpReLUSAE(16, 24)}
    return {name: (sae, layers[layer]) for (name, sae), layer in zip(saes.items(), (0, 2, 0), strict=True)}


def options(**more: Any) -> dict[str, Any]:
    return {"special_tokens": SPECIAL, "max_norm_multiple": 1.05, "progress": False, **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_measured_as_if_it_were_alone(tiny_model: Any, tokenizer: Any, batches: Any, family: str) -> None:
    saes = made(tiny_model(family))
    together = evaluate_many(saes, tokenizer, batches, **options())
    assert list(together) == ["a", "b", "c"]
    for name, (sae, residual) in saes.items():
        alone = evaluate(sae, ResidualStream(residual.model, residual.layer), tokenizer, batches, **options())
        found = together[name]
        assert found.metrics == alone.metrics
        assert found.metrics["sinks_beyond_position_0"] > 0
        assert found.special_tokens == alone.special_tokens
        assert found.top_special_features == alone.top_special_features
        assert len(found.top_special_features) > 0
        assert torch.equal(found.feature_counts, alone.feature_counts)
        assert 0 < found.seconds < 1000
    assert together["a"].metrics["ce_spliced"] != together["c"].metrics["ce_spliced"]
    assert together["a"].metrics["ce"] == together["b"].metrics["ce"]
    assert together["a"].metrics["ce_zero"] == together["c"].metrics["ce_zero"] != together["b"].metrics["ce_zero"]


def test_the_passes_that_do_not_depend_on_the_sae_are_shared(
    qwen2: Any, tokenizer: Any, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = made(qwen2)
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def called(*arguments: Any, **given: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **given)

        monkeypatch.setattr(owner, name, called)

    for residual in {residual for _, residual in saes.values()}:
        SplicedModel(residual).check(batches[0].input_ids[:1], batches[0].attention_mask[:1])
    count(ResidualStream, "logits")
    count(SplicedModel, "spliced")
    count(reconstruction, "_row_groups")
    n_groups = sum(len(list(reconstruction._row_groups(batch, saes["a"][1]))) for batch in batches)
    assert n_groups > len(batches)
    evaluate_many(saes, tokenizer, batches, **options())
    assert calls["spliced"] == n_groups * (2 + 3)  # zeros at two layers, and three SAEs
    assert calls["logits"] == n_groups * (1 + 2 + 3)  # and one clean pass


def test_one_that_fails_is_dropped_and_the_others_are_measured(qwen2: Any, tokenizer: Any, batches: Any) -> None:
    saes = made(qwen2)
    expected = evaluate_many(saes, tokenizer, batches, **options())
    with torch.no_grad():
        saes["a"][0].W_dec.fill_(3e38)
    failed: dict[str, str] = {}
    found = evaluate_many(
        saes, tokenizer, batches, **options(on_failure=lambda name, error: failed.update({name: str(error)}))
    )
    assert list(found) == ["b", "c"]
    assert [one.metrics for one in found.values()] == [expected[name].metrics for name in found]
    assert failed.keys() == {"a"}
    assert "reconstruction" in failed["a"]
    with pytest.raises(FastsaeError, match="reconstruction"):
        evaluate_many(saes, tokenizer, batches, **options())


def test_an_sae_of_another_width_is_refused(qwen2: Any, tokenizer: Any, batches: Any) -> None:
    saes = made(qwen2)
    saes["b"] = (FusedJumpReLUSAE(8, 16), saes["b"][1])
    with pytest.raises(UsageError, match=r"width 8, but layer 2 of the model gives 16"):
        evaluate_many(saes, tokenizer, batches, **options())
