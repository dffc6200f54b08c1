"""The pass on a tiny model: against its dense features, for every architecture; stopped, resumed, and with bad input."""

import copy
import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tqdm
from safetensors.torch import load_file
from store_problem import Talk, expected

from fastsae import (
    FastsaeError,
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedTopKSAE,
    SparseAutoencoder,
    UsageError,
)
from fastsae.data import sinks
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import SinkRule
from fastsae.data.special_tokens import SpecialTokens
from fastsae.evaluate.token_kinds import KINDS, TokenKinds
from fastsae.interpret import collect
from fastsae.interpret.collect import collect_examples
from fastsae.interpret.per_feature import SPECIAL
from fastsae.interpret.store import HEADER, ExampleStore
from fastsae.interrupt import Interrupted

transformers = pytest.importorskip("transformers")

D_IN, D_SAE, SEED = 16, 30, 5
SPECIAL_TOKENS = SpecialTokens({"<|im_start|>": 3, "user": 4})
TOKENIZER = SimpleNamespace(decode=lambda ids: "".join(f"t{i} " for i in ids))
LENGTHS = (1, 2, 9, 30, 31, 32, 33, 60)
FACTS = {"model": "tiny", "layer": 1, "sizes": (1, 2)}


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """A process that a shell started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def few_tokens_tell_the_median():
    """So that the first batch does, and the others are read one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks, "SAMPLE_TOKENS", 20)
        yield


@pytest.fixture(scope="module")
def residual() -> ResidualStream:
    """Whose token 9 is an attention sink wherever it stands."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=D_IN,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8)

    def lengthen(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == 9)[..., None], 10_000 * output, output)

    model.get_input_embeddings().register_forward_hook(lengthen)
    return ResidualStream(model, 1)


@pytest.fixture(scope="module")
def batches() -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(9):
        ids = torch.randint(3, 61, (6, 60), generator=generator)
        ids[0, 7] = 9
        lengths = torch.tensor([LENGTHS[(number * 5 + row) % len(LENGTHS)] for row in range(6)])
        mask = torch.arange(60) < lengths[:, None]
        dialogues = torch.tensor([500 - 6 * number - row for row in range(6)])
        longest = int(lengths.max())
        found.append(TokenBatch.one_per_row((ids * mask)[:, :longest], mask[:, :longest], dialogues))
    return found


def activations(residual: ResidualStream, batch: TokenBatch) -> torch.Tensor:
    return residual(batch.input_ids, batch.attention_mask)[batch.attention_mask]


def make_sae(kind: str, residual: ResidualStream, batch: TokenBatch) -> SparseAutoencoder:
    torch.manual_seed(2)
    sae: Any = {
        "jumprelu": lambda: FusedJumpReLUSAE(D_IN, D_SAE, init_threshold=0.0),
        "relu": lambda: FusedReLUSAE(D_IN, D_SAE),
        "relu of k": lambda: FusedReLUSAE(D_IN, D_SAE, k=3),
        "topk": lambda: FusedTopKSAE(D_IN, D_SAE, k=3),
        "batchtopk": lambda: FusedBatchTopKSAE(D_IN, D_SAE, k=3),
    }[kind]()
    if "topk" not in kind:
        sae.shift_gates_(sae.encode(activations(residual, batch)).quantile(0.9))
    elif kind == "batchtopk":
        sae.calibrate_threshold_(activations(residual, batch))
    sae.b_enc.data[0] = -1e9  # a dead feature
    return sae


@pytest.fixture(scope="module")
def sae(residual, batches) -> SparseAutoencoder:
    return make_sae("jumprelu", residual, batches[0])


def run(sae, residual, batches, folder: Path, **options: Any) -> ExampleStore:
    options = {"special_tokens": SPECIAL_TOKENS, "seed": SEED, "facts": FACTS, "progress": False, **options}
    return collect_examples(sae, residual, TOKENIZER, iter(batches), folder, **options)


def bits(folder: Path) -> dict[str, bytes]:
    name = json.loads((folder / HEADER).read_text())["tensors"]
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / name).items()}


@pytest.fixture(scope="module")
def uninterrupted(sae, residual, batches, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(sae, residual, batches, folder)
    return bits(folder)


@torch.no_grad()
def make_talks(sae, residual, batches) -> list[Talk]:
    (rule,) = SinkRule.of_layers([residual], batches)
    kinds_of, talks = TokenKinds(TOKENIZER, SPECIAL_TOKENS), []
    for batch in batches:
        x = activations(residual, batch)
        dense = sae.encode_sparse(x).to_dense()
        torch.testing.assert_close(dense, sae.encode(x), rtol=1e-4, atol=1e-4)
        is_sink = rule(x, batch.positions[batch.attention_mask])
        kinds = kinds_of(batch.input_ids, batch.attention_mask, is_sink).tolist()
        tokens, start = batch.input_ids[batch.attention_mask].tolist(), 0
        for dialogue, length in zip(
            batch.dialogue_ids[:, 0].tolist(), batch.attention_mask.sum(1).tolist(), strict=True
        ):
            part = slice(start, start + length)
            talks.append(Talk(dialogue, tokens[part], kinds[part], dense[part]))
            start += length
    return talks


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "relu of k", "topk", "batchtopk"])
def test_every_architecture(kind, residual, batches, tmp_path, monkeypatch):
    sae = make_sae(kind, residual, batches[0])
    monkeypatch.setattr(residual.model.lm_head, "forward", None)  # logits are not needed
    store = run(sae, residual, batches, tmp_path, n_dialogues=54)
    talks = make_talks(sae, residual, batches)
    kinds = torch.tensor([kind for talk in talks for kind in talk.kinds])
    assert {KINDS.index("late_sink"), SPECIAL, KINDS.index("position_0")} <= set(kinds.tolist())
    counted = torch.cat([talk.counted for talk in talks])
    assert torch.equal(store.counts, (counted > 0).sum(0))
    assert not store.counts[0]
    torch.testing.assert_close(store.mean_special, counted[kinds == SPECIAL].double().mean(0).float())
    assert (store.d_sae, store.n_dialogues, store.n_tokens) == (D_SAE, 54, int((kinds <= SPECIAL).sum()))
    assert store.facts == {"model": "tiny", "layer": 1, "sizes": [1, 2]}
    alive = store.alive(1)
    assert len(alive) > 15
    for feature in alive:
        found = store.examples(feature)
        whole = expected(talks, feature, SEED, found)
        assert found.mean_special == pytest.approx(whole.mean_special)
        assert vars(found) | {"mean_special": 0} == vars(whole) | {"mean_special": 0}


def test_a_bf16_model(residual, batches, sae, tmp_path):
    narrow = ResidualStream(copy.deepcopy(residual.model).to(torch.bfloat16), 1)
    store = run(sae, narrow, batches, tmp_path)
    counted = torch.cat([talk.counted for talk in make_talks(sae, narrow, batches)])
    assert torch.equal(store.counts, (counted > 0).sum(0))


def test_one_dialogue_at_a_time(residual, batches, sae, uninterrupted, tmp_path):
    single = [batch[row : row + 1] for batch in reversed(batches) for row in range(6)]
    first = run(sae, residual, batches, tmp_path / "a")
    store = run(sae, residual, single, tmp_path / "b", max_norm_multiple=10.0)
    assert store.n_dialogues == first.n_dialogues
    for feature in first.alive(1):
        a, b = first.examples(feature), store.examples(feature)
        assert a.maximum == pytest.approx(b.maximum, rel=1e-3)
        assert [one.dialogue for one in a.top[:3]] == [one.dialogue for one in b.top[:3]]


def test_a_dialogue_that_comes_twice_counts_once(residual, batches, sae, uninterrupted, tmp_path):
    run(sae, residual, [*batches, batches[2]], tmp_path / "a")
    assert bits(tmp_path / "a") == uninterrupted
    row = torch.tensor([0, 1, 1, 2, 0])
    twice = [batches[0][row], *batches[1:]]
    assert run(sae, residual, twice, tmp_path / "b").n_dialogues == 51


class StoppedError(Exception):
    pass


def stopping(batches, after: int, how):
    yield from itertools.islice(batches, after)
    how()
    yield from itertools.islice(batches, after, None)


@pytest.fixture
def saves_always(monkeypatch):
    monkeypatch.setattr(collect, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(collect, "_SAVE_SHARE", float("inf"))


def die():
    raise StoppedError


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("after", [1, 4, 8])
@pytest.mark.parametrize("how", [die, interrupt])
def test_a_resumed_pass_has_the_same_bits(residual, batches, sae, uninterrupted, tmp_path, saves_always, after, how):
    with pytest.raises((StoppedError, Interrupted)) as caught:
        run(sae, residual, stopping(batches, after, how), tmp_path)
    if how is interrupt:
        assert f"what was read stays in {tmp_path}, and the same command goes on" in str(caught.value)
    with pytest.raises(UsageError, match="has not finished, it was stopped after"):
        ExampleStore.load(tmp_path)
    read: list[int] = []
    counted = (read.append(len(batch.input_ids)) or batch for batch in batches)
    store = run(sae, residual, counted, tmp_path)
    assert (store.n_dialogues, len(read)) == (54, 9)
    assert bits(tmp_path) == uninterrupted


def test_an_interrupted_pass_keeps_what_it_read_since_the_last_save(residual, batches, sae, uninterrupted, tmp_path):
    with pytest.raises(Interrupted):
        run(sae, residual, stopping(batches, 5, interrupt), tmp_path)
    with pytest.raises(UsageError, match=r"after (30|36) dialogues"):
        ExampleStore.load(tmp_path)
    run(sae, residual, batches, tmp_path)
    assert bits(tmp_path) == uninterrupted


def test_a_second_interruption_and_one_before_anything_was_read(residual, batches, sae, uninterrupted, tmp_path):
    for after in (0, 0, 3):
        with pytest.raises(KeyboardInterrupt):
            run(sae, residual, stopping(batches, after, interrupt), tmp_path)
    run(sae, residual, batches, tmp_path)
    assert bits(tmp_path) == uninterrupted


def test_a_save_that_is_killed_leaves_the_state_before(
    residual, batches, sae, uninterrupted, tmp_path, saves_always, monkeypatch
):
    n_writes, write = 0, collect.write_examples

    def killed(folder: Path, *arguments: Any) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes == 4:
            (folder / "examples-1.safetensors").write_bytes(b"half of it")  # the header names the other one
            raise StoppedError
        write(folder, *arguments)

    monkeypatch.setattr(collect, "write_examples", killed)
    with pytest.raises(StoppedError):
        run(sae, residual, batches, tmp_path)
    with pytest.raises(UsageError, match="after 18 dialogues"):
        ExampleStore.load(tmp_path)
    run(sae, residual, batches, tmp_path)
    assert bits(tmp_path) == uninterrupted


def test_resuming_with_other_batches_reads_the_dialogues_that_are_left(residual, batches, sae, tmp_path, saves_always):
    with pytest.raises(StoppedError):
        run(sae, residual, stopping(batches, 4, die), tmp_path)
    mixed = [batch[[row]] for row in range(6) for batch in batches]
    assert run(sae, residual, mixed, tmp_path).n_dialogues == 54


def test_resuming_a_finished_store_reads_nothing(residual, batches, sae, uninterrupted, tmp_path):
    run(sae, residual, batches, tmp_path)
    assert run(sae, residual, stopping(batches, 0, die), tmp_path).n_dialogues == 54


def test_examples_of_something_else_are_replaced(residual, batches, sae, uninterrupted, tmp_path, saves_always, caplog):
    other = make_sae("jumprelu", residual, batches[1])
    caplog.set_level("INFO", "fastsae")
    for own, changed, what in (
        (sae, {"seed": 6}, "the seed"),
        (sae, {"max_norm_multiple": 5.0}, "max_norm_multiple"),
        (sae, {"facts": {**FACTS, "layer": 2}}, "layer (1, now 2)"),
        (sae, {"facts": {}}, "model ('tiny', now none), layer (1, now none)"),
        (other, {}, "the SAE's weights"),
        (FusedJumpReLUSAE(D_IN, 8), {}, "the number of features, the SAE's weights"),
    ):
        with pytest.raises(StoppedError):
            run(sae, residual, stopping(batches, 3, die), tmp_path)
        caplog.clear()
        assert run(own, residual, batches[:2], tmp_path, **changed).n_dialogues == 12
        assert f"collected anew: they have another value of {what}" in caplog.text
    run(sae, residual, batches, tmp_path)  # nor does a finished store of something else stay
    assert bits(tmp_path) == uninterrupted


def test_a_damaged_state(residual, batches, sae, tmp_path):
    (tmp_path / HEADER).write_text("{}")
    with pytest.raises(FastsaeError, match=r"found damaged ones .*Delete the folder"):
        run(sae, residual, batches, tmp_path)


def test_bad_input(residual, batches, sae, tmp_path):
    with pytest.raises(UsageError, match="no dialogues to collect examples from"):
        run(sae, residual, [], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="activations of width 8, but layer 1 of the model gives 16"):
        run(FusedJumpReLUSAE(8, 8), residual, batches, tmp_path / "b")
    broken = FusedJumpReLUSAE(D_IN, D_SAE, init_threshold=0.0)
    broken.W_enc.data.fill_(3e38)
    with pytest.raises(FastsaeError, match="Its weights are damaged"):
        run(broken, residual, batches, tmp_path / "c")


def test_a_pass_over_dialogues_of_one_token(residual, batches, sae, tmp_path):
    single = [batch[:, :1] for batch in batches]
    store = run(sae, residual, single, tmp_path)
    assert (store.n_tokens, store.n_dialogues, store.alive(1), store.silent(3, 5)) == (0, 54, [], [])


def test_its_progress_is_shown(residual, batches, sae, tmp_path, capsys, monkeypatch):
    shown = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda *arguments, **options: shown(*arguments, **{**options, "delay": 0}))
    run(sae, residual, batches, tmp_path, progress=True, n_dialogues=54)
    assert "collecting examples: 100%" in capsys.readouterr().err
