"""How features are chosen, against dense features and loops over tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastsae import FusedJumpReLUSAE, UsageError
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import FastSequencer
from fastsae.data.sinks import SinkRule
from fastsae.data.special_tokens import SpecialTokens, find_special_tokens
from fastsae.interpret.collect import collect_examples
from fastsae.steering.select import NEUTRAL, by_output_score, by_special_tokens, by_text

transformers = pytest.importorskip("transformers")
D_SAE = 40


@pytest.fixture(scope="module")
def world(tiny_model, chats, tmp_path_factory) -> SimpleNamespace:
    import json

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(1)
    sae = FusedJumpReLUSAE(16, D_SAE)
    with torch.no_grad():
        sae.threshold.fill_(0.02)
        sae.W_enc[:, 5] = 0  # never fires
    dialogues = [json.loads(line)["messages"] for line in chats.read_text().splitlines()][:12]
    residual, special = ResidualStream(model, 1), find_special_tokens(tokenizer)

    def batches() -> Any:
        return FastSequencer(dialogues, list(range(12)), tokenizer, 256, shuffle=False, endless=False, batch_tokens=200)

    store = collect_examples(
        sae, residual, tokenizer, batches(), tmp_path_factory.mktemp("examples"), special_tokens=special, seed=0,
        facts={}, n_dialogues=12, max_norm_multiple=10.0, progress=False,
    )  # fmt: skip
    return SimpleNamespace(**{name: value for name, value in locals().items() if name != "json"})


def test_special_tokens_against_loops(world):
    rule = SinkRule(None, None)
    found = by_special_tokens(world.sae, world.residual, world.special, world.batches(), rule, n=3, progress=False)
    maxima: dict[tuple[int, int], list[torch.Tensor]] = {}
    for batch in world.batches():
        acts = world.sae.encode(world.residual(batch.input_ids, batch.attention_mask)).detach()
        classes = world.special.classes(batch.input_ids)
        for row in range(len(batch.input_ids)):
            length = int(batch.attention_mask[row].sum())
            for kind in range(len(world.special.names)):
                places = [i for i in range(1, length) if classes[row, i] == kind]  # but the first token, a sink
                if places:
                    maxima.setdefault((kind, 0), []).append(acts[row, places].amax(0))
    means = torch.stack([torch.stack(maxima[kind, 0]).mean(0) for kind in range(len(world.special.names))])
    assert len(maxima[0, 0]) == 12
    expected = {}
    for kind, row in enumerate(means):
        for feature in row.topk(3).indices.tolist():
            if row[feature] > expected.get(feature, (0.0, ""))[0]:
                expected[feature] = (float(row[feature]), world.special.names[kind])
    assert {one.feature for one in found} == set(expected)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        score, name = expected[one.feature]
        assert one.score == pytest.approx(score, rel=1e-5)
        assert one.chosen_by == f"strongest at {name}"


def test_special_tokens_that_are_not_there(world):
    rule = SinkRule(None, None)
    with pytest.raises(UsageError, match="chat template that writes special tokens"):
        by_special_tokens(world.sae, world.residual, SpecialTokens(), world.batches(), rule, progress=False)
    silent = FusedJumpReLUSAE(16, 4)
    with torch.no_grad():
        silent.threshold.fill_(1e6)
    with pytest.raises(UsageError, match="no feature fires on a special token"):
        by_special_tokens(silent, world.residual, world.special, world.batches(), rule, progress=False)


def test_output_score_against_its_formula(world):
    found = by_output_score(world.sae, world.residual, world.tokenizer, world.store, progress=False)
    assert sorted(one.feature for one in found) == world.store.alive(5)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    head = world.model.get_output_embeddings().weight.detach()
    gain = world.model.model.norm.weight.detach()
    ids = torch.tensor([world.tokenizer(NEUTRAL)["input_ids"]])
    for one in found[:3] + found[-2:]:
        row = world.sae.W_dec[one.feature].detach()
        lens = ((row * gain) @ head.t()).topk(20).indices

        def push(hidden: torch.Tensor, row: torch.Tensor = row) -> torch.Tensor:
            changed = hidden.clone()
            changed[0, -1] += hidden[0, -1].norm() * row / row.norm()
            return changed

        logits = world.residual.splice(ids, torch.ones_like(ids), push)[0, -1]
        rank = min(int((logits > logits[token]).sum()) for token in lens)
        expected = (1 - rank / len(logits)) * float(logits.softmax(0)[lens].max())
        assert one.score == pytest.approx(expected, rel=1e-3)


def test_text_and_explanations(world):
    chosen = {name: getattr(world, name) for name in ("sae", "residual", "tokenizer", "store")}
    found = by_text("number seven", **chosen, explanations={7: "counts of Sheep", 3: "colours"})
    ids = torch.tensor([world.tokenizer("number seven")["input_ids"]])
    acts = world.sae.encode(world.residual(ids, torch.ones_like(ids)))[0, 1:].detach()
    scores = {}
    for k in range(D_SAE):
        if world.store.counts[k] and acts[:, k].any():
            share = torch.tensor(world.store.examples(k).density)
            scores[k] = float(-share.log() * acts[:, k].sum() / world.store.examples(k).maximum)
    assert [one.feature for one in found] == sorted(scores, key=scores.__getitem__, reverse=True)
    assert found[0].score == pytest.approx(max(scores.values()), rel=1e-4)
    named = by_text("sheep", **chosen, explanations={7: "counts of Sheep", 3: "colours"})
    assert (named[0].feature, named[0].chosen_by) == (7, "explained as 'counts of Sheep'")
    assert [one.feature for one in named].count(7) == 1
    with pytest.raises(UsageError, match="no feature that is known fires on ''"):
        by_text("", **chosen, explanations={})
