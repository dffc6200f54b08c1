"""What a store says of each feature, against dense features and loops over dialogues; and stores that cannot be read."""

import itertools
import random

import pytest
import torch
from store_problem import Talk, expected, gather, make_talks, sparse, window

from fastsae import FastsaeError, UsageError
from fastsae.evaluate.token_kinds import KINDS
from fastsae.interpret.per_feature import N_POOL, SPECIAL, Gathered, Rows
from fastsae.interpret.store import HEADER, TENSORS, ExampleStore, write_examples
from fastsae.interpret.windows import WINDOW

D_SAE, SEED, SINK = 45, 3, KINDS.index("special_position_0")
LENGTHS = random.Random(0).choices([1, 2, 5, 20, 31, 32, 33, 50, 90], k=70)


def stored(gathered: Gathered, folder, seed: int = SEED, is_complete: bool = True) -> ExampleStore:
    d_sae = len(gathered.tensors()["histogram"])
    header = {"seed": seed, "d_sae": d_sae, "facts": {"model": "tiny"}, "is_complete": is_complete}
    write_examples(folder, header, gathered.tensors())
    return ExampleStore.load(folder)


@pytest.fixture(scope="module")
def talks() -> list[Talk]:
    return make_talks(LENGTHS, D_SAE)


@pytest.fixture(scope="module")
def store(talks, tmp_path_factory) -> ExampleStore:
    return stored(gather(Gathered(D_SAE, SEED), talks), tmp_path_factory.mktemp("store"))


def test_every_feature(talks, store):
    for feature in range(2, D_SAE):
        found = store.examples(feature)
        assert found == expected(talks, feature, SEED, found), feature


def test_what_is_said_of_the_whole(talks, store):
    counted = torch.cat([talk.counted for talk in talks])
    assert torch.equal(store.counts, (counted > 0).sum(0))
    kinds = torch.tensor([kind for talk in talks for kind in talk.kinds])
    torch.testing.assert_close(store.mean_special, counted[kinds == SPECIAL].mean(0))
    assert (store.d_sae, store.n_dialogues, store.seed, store.facts) == (D_SAE, 70, SEED, {"model": "tiny"})
    assert store.n_tokens == (kinds <= SPECIAL).sum()
    n_windows = torch.stack([talk.counted.amax(0) > 0 for talk in talks]).sum(0)
    for least in (1, 5, 20):
        assert store.alive(least) == (n_windows >= least).nonzero()[:, 0].tolist()


def test_a_dead_feature_and_one_that_is_not_there(store):
    for feature in (0, 1):  # one fires nowhere, one on attention sinks alone
        with pytest.raises(UsageError, match=f"feature {feature} fires on none of the .* tokens of these 70 dialogues"):
            store.examples(feature)
    for feature in (-1, D_SAE):
        for ask in (store.examples, lambda feature: store.silent(feature, 3)):
            with pytest.raises(UsageError, match=rf"feature {feature}: expected 0 to 44 \(the SAE has 45 features\)"):
                ask(feature)
    with pytest.raises(UsageError, match="expected 1 to 20"):
        store.alive(21)


def test_silent_windows_are_silent_and_all_of_the_pool_are_found(talks, store):
    of_dialogue = {talk.dialogue: talk for talk in talks}
    pool = store.silent(0, N_POOL)
    assert len(pool) > len([length for length in LENGTHS if length > 1])  # several of long dialogues
    for feature in range(D_SAE):
        found = store.silent(feature, N_POOL)
        silent = []
        for one in pool:
            same = window(of_dialogue[one.dialogue], feature, one.start + one.peak)
            assert (same.tokens, same.kinds, same.start, same.peak) == (one.tokens, one.kinds, one.start, one.peak)
            silent += [same] if not any(same.activations) else []
        assert found == silent  # in the same order
        assert store.silent(feature, 3) == found[:3]
    assert 0 < len(store.silent(20, N_POOL)) < len(pool)
    assert store.silent(2, 5) == []  # it fires on every token that counts


def test_silent_windows_do_not_overlap_and_those_of_different_dialogues_come_first(store):
    found = store.silent(0, N_POOL)
    n_long = sum(length > 1 for length in LENGTHS)
    assert len({one.dialogue for one in found[:n_long]}) == n_long
    assert all(one.start + one.peak > 0 and one.value == 0 for one in found)
    spans = sorted((one.dialogue, one.start) for one in found)
    for (dialogue, start), (following, next_start) in itertools.pairwise(spans):
        assert dialogue != following or next_start - start >= WINDOW


def test_silent_windows_by_seed_and_without_some_dialogues(store):
    found = store.silent(0, 20, seed=1)
    assert store.silent(0, 20, seed=1) == found != store.silent(0, 20, seed=2)
    exclude = {one.dialogue for one in found[:10]}
    others = store.silent(0, N_POOL, seed=1, exclude=exclude)
    assert [one for one in store.silent(0, N_POOL, seed=1) if one.dialogue not in exclude] == others


def test_another_sae_on_the_same_dialogues_has_the_same_pool(talks, store, tmp_path):
    others = make_talks(LENGTHS, 9, share=0.5, seed=8)
    for talk, other in zip(talks, others, strict=True):
        other.tokens = talk.tokens
    other = stored(gather(Gathered(9, SEED), others, size=4), tmp_path)
    places = [
        [(one.dialogue, one.start, one.peak, one.tokens) for one in each.silent(0, N_POOL)] for each in (store, other)
    ]
    assert places[0] == places[1]


def test_neither_order_nor_batches_matter(talks, store, tmp_path):
    for i, size in enumerate((1, 3, 70)):
        shuffled = random.Random(i).sample(talks, len(talks))
        other = stored(gather(Gathered(D_SAE, SEED), shuffled, size), tmp_path / str(i))
        assert torch.equal(other.counts, store.counts)
        torch.testing.assert_close(other.mean_special, store.mean_special)
        for feature in range(2, D_SAE):
            a, b = (vars(one.examples(feature)) | {"mean_special": None} for one in (store, other))
            assert a == b
            assert other.silent(feature, N_POOL) == store.silent(feature, N_POOL)


def test_state_that_was_restored_goes_on_to_the_same_bits(talks, tmp_path):
    whole = gather(Gathered(D_SAE, SEED), talks)
    gathered = gather(Gathered(D_SAE, SEED), talks[:28])
    other = Gathered(D_SAE, SEED)
    other.restore({name: tensor.clone() for name, tensor in gathered.tensors().items()})
    found = gather(other, talks[28:]).tensors()
    assert set(found) == set(whole.tensors())
    for name, tensor in whole.tensors().items():
        assert torch.equal(found[name], tensor), name


def test_values_beyond_the_histogram(tmp_path):
    values = [1e-9, 2.0**-16, 1.5, 2.0**16, 3e7]
    acts = torch.zeros(6, 1)
    acts[1:, 0] = torch.tensor(values)
    store = stored(gather(Gathered(1, 0), [Talk(0, [5] * 6, [4, 0, 0, 0, 0, 0], acts)]), tmp_path)
    found = store.examples(0)
    assert (found.edges[0], found.edges[-1]) == (0, found.maximum)
    assert found.maximum == torch.tensor(3e7).item()
    assert list(found.edges) == sorted(set(found.edges))
    assert (found.histogram[0], found.histogram[-1], sum(found.histogram)) == (2, 2, 5)
    assert found.top[0].activations == tuple(acts[:, 0].tolist())
    assert found.mean_special == 0  # there are no special tokens


def test_the_histogram_has_no_bins_that_nobody_needs(store):
    found = store.examples(2)  # 1, 2 and 3
    assert found.edges == (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5)
    assert found.histogram[1:4] == (0, 0, 0)
    assert sum(found.histogram) == found.count


def test_its_size_does_not_grow_with_the_tokens(talks):
    def n_bytes(gathered: Gathered) -> int:
        return sum(tensor.nbytes for tensor in gathered.tensors().values())

    empty, few, many = (gather(Gathered(D_SAE, 0), talks[:n]) for n in (0, 20, 70))
    assert n_bytes(empty) == D_SAE * (60 * (16 + 4 * 32) + 4 * 128 + 8) + N_POOL * (16 + 6)
    for gathered, n in ((few, 20), (many, 70)):
        assert n_bytes(gathered) == n_bytes(empty) + 5 * sum(LENGTHS[:n]) + 16 * n


def test_no_entries(tmp_path):
    talks = [Talk(n, [5, 6, 7], [SINK, 0, 0], torch.zeros(3, 2)) for n in range(3)]
    store = stored(gather(Gathered(2, 0), talks), tmp_path)
    assert store.alive(1) == []
    assert len(store.silent(1, 9)) == 3
    with pytest.raises(UsageError, match="choose one of the 0 features"):
        store.examples(1)


def test_windows_that_are_looked_up_in_parts(monkeypatch, talks, store, tmp_path):
    monkeypatch.setattr("fastsae.interpret.per_feature._LOOKUPS", 5)
    other = stored(gather(Gathered(D_SAE, SEED), talks), tmp_path)
    assert [other.examples(feature) for feature in range(2, 9)] == [store.examples(feature) for feature in range(2, 9)]


def test_bf16_and_fp64_features(tmp_path):
    acts = torch.tensor([[9.0], [0.3], [2.0]])
    rows = Rows(torch.tensor([0]), torch.tensor([3]), torch.tensor([5, 6, 7]), torch.tensor([SINK, 0, 0]))
    for dtype in (torch.bfloat16, torch.float64):
        gathered = Gathered(1, 0)
        gathered.add(rows, sparse(acts.to(dtype)))
        found = stored(gathered, tmp_path / str(dtype)).examples(0)
        assert found.top[0].activations == (0, acts.to(dtype).float()[1].item(), 2)


def test_no_store(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="expected a folder of examples"):
            ExampleStore.load(folder)


@pytest.mark.parametrize("damage", ["header", "list", "format", "missing", "cut", "flipped", "no features"])
def test_a_damaged_store(store, talks, tmp_path, damage):
    stored(gather(Gathered(D_SAE, SEED), talks[:5]), tmp_path)
    header, tensors = tmp_path / HEADER, tmp_path / TENSORS[0]
    text, content = header.read_text(), bytearray(tensors.read_bytes())
    if damage in ("header", "list"):
        header.write_text("{" if damage == "header" else "[]")
    elif damage in ("format", "no features"):
        changed = ('"format": 1', '"format": 2') if damage == "format" else ('"d_sae": 45', '"d_sae": 0')
        assert changed[0] in text
        header.write_text(text.replace(*changed))
    elif damage == "missing":
        tensors.unlink()
    else:
        content[-100] ^= 1
        tensors.write_bytes(content[:-50] if damage == "cut" else content)
    with pytest.raises(FastsaeError, match="expected whole examples of features, found damaged ones") as caught:
        ExampleStore.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_unfinished_store(talks, tmp_path):
    with pytest.raises(
        UsageError, match=r"has not finished, it was stopped after 5 dialogues.*the same command goes on"
    ):
        stored(gather(Gathered(D_SAE, SEED), talks[:5]), tmp_path, is_complete=False)


@pytest.mark.parametrize("dies_in", ["write_tensors", "write_json"])
def test_a_write_that_is_killed_leaves_what_was_there(talks, tmp_path, monkeypatch, dies_in):
    first = stored(gather(Gathered(D_SAE, SEED), talks[:30]), tmp_path).examples(5)

    def die(path, _):
        path.with_name(f".{path.name}.abcdefgh").write_bytes(b"half of it")
        raise KeyboardInterrupt

    second = gather(Gathered(D_SAE, SEED), talks)
    with monkeypatch.context() as patch:
        patch.setattr(f"fastsae.interpret.store.{dies_in}", die)
        with pytest.raises(KeyboardInterrupt):
            stored(second, tmp_path)
    assert ExampleStore.load(tmp_path).examples(5) == first
    assert stored(second, tmp_path).examples(5) != first
    assert len(list(tmp_path.iterdir())) == 2
