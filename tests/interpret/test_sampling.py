"""The hash and the smallest keys: exact against sorting, uniform by chi-square tests whose false alarms are one in a million."""

import math
import random

import pytest
import torch

from fastsae.interpret.sampling import EMPTY, BottomK, Tokens, hashed


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations too large the statistic is, in the normal approximation of Wilson and Hilferty."""
    n = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ((statistic / n) ** (1 / 3) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))


LEVEL = 4.75  # standard deviations: the statistic is as large once in a million draws of the seed


def splitmix(x: int) -> int:
    """The last step of SplitMix64, in Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64():
    for parts in ((0,), (1, 2), (2**63 - 1, 5, -3), (2**62, 2**62)):
        found = 0
        for part in parts:
            found = splitmix((found + 0x9E3779B97F4A7C15 + part) % 2**64)
        assert int(hashed(*parts[:1], *map(torch.tensor, parts[1:]))) == found % 2**63
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of the generator with seed 0
    assert int(hashed(-1)) == int(hashed(2**63 - 1))
    assert int(hashed(10**30)) >= 0


def test_every_part_of_the_hash_counts_and_is_spread():
    grid = torch.arange(300)
    found = hashed(4, grid[:, None], grid)
    assert len(found.unique()) == 90_000
    assert found.amin() >= 0
    for column in (found >> 57, found & 63, (found >> 30) & 63):
        assert chi_square(column.flatten().bincount(minlength=64).double(), torch.full((64,), 90_000 / 64)) < LEVEL
    pairs = (found[:, 1:] >> 60) * 8 + (found[:, :-1] >> 60)  # neighbours are independent
    n = pairs.numel() / 64
    assert chi_square(pairs.flatten().bincount(minlength=64).double(), torch.full((64,), n)) < LEVEL


def make_entries(n: int, n_groups: int, n_units: int, n_keys: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Group, key, unit, position; a key belongs to one unit, as values with their dialogue do, and comes often in it."""
    generator = random.Random(seed)
    found = []
    for position in range(n):
        unit = generator.randrange(n_units)
        found.append((generator.randrange(n_groups), generator.randrange(n_keys) * n_units + unit, unit, position))
    return found


def add(kept: BottomK, entries: list[tuple[int, int, int, int]]) -> None:
    groups, keys, units, positions = (torch.tensor(column, dtype=torch.int64) for column in zip(*entries, strict=True))
    names = {unit: i for i, unit in enumerate(dict.fromkeys(units.tolist()))}
    where = Tokens(torch.tensor([names[unit] for unit in units.tolist()]), units + 100, positions)
    taken = kept.add(groups, keys, torch.arange(len(keys)), where)
    assert torch.equal(groups[taken.entries], taken.groups)
    assert torch.equal(kept.keys[taken.groups, taken.slots], keys[taken.entries])
    assert len({*zip(taken.groups.tolist(), taken.slots.tolist(), strict=True)}) == len(taken.slots)


def contents(kept: BottomK) -> list[list[tuple[int, int, int]]]:
    rows = zip(kept.keys.tolist(), kept.dialogues.tolist(), kept.positions.tolist(), strict=True)
    return [sorted(slot for slot in zip(*row, strict=True) if slot[0] != EMPTY) for row in rows]


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("n_keys", [2, 1000])
def test_it_keeps_the_smallest_of_each_unit(k, n_keys):
    for seed in range(5):
        entries = make_entries(400, 6, 30, n_keys, seed)
        smallest: dict[tuple[int, int], tuple[int, int]] = {}
        for group, key, unit, position in entries:
            smallest[group, unit] = min(smallest.get((group, unit), (EMPTY, 0)), (key, position))
        expected = [
            sorted((key, unit + 100, at) for (of, unit), (key, at) in smallest.items() if of == group)[:k]
            for group in range(6)
        ]
        for size in (1, 4, 30):  # units that come together
            kept = BottomK(6, k)
            for first in range(0, 30, size):
                part = [entry for entry in entries if first <= entry[2] < first + size]
                if part:
                    add(kept, part)
            assert contents(kept) == expected


def test_nothing_to_add():
    kept, nothing = BottomK(2, 3), torch.empty(0, dtype=torch.int64)
    for where in (Tokens(nothing, nothing, nothing), Tokens(*[torch.zeros(4, dtype=torch.int64)] * 3)):
        assert [len(column) for column in kept.add(nothing, nothing, nothing, where)] == [0, 0, 0]
    assert contents(kept) == [[], []]
    empty = torch.tensor([0])
    assert len(kept.add(empty, torch.tensor([EMPTY]), empty, Tokens(empty, empty, empty)).slots) == 0


def sample(n_groups: int, k: int, tokens_of: list[int], seed: int) -> BottomK:
    """Every group fires on the same tokens: `tokens_of` says on how many of each dialogue."""
    dialogues = torch.arange(len(tokens_of)).repeat_interleave(torch.tensor(tokens_of))
    positions = torch.cat([torch.arange(n) for n in tokens_of])
    keys = hashed(hashed(seed, dialogues, positions)[:, None] + hashed(torch.arange(n_groups)))
    kept, tokens = BottomK(n_groups, k), torch.arange(len(dialogues))
    groups = torch.arange(n_groups).repeat(len(tokens))
    kept.add(groups, keys.flatten(), tokens.repeat_interleave(n_groups), Tokens(dialogues, dialogues, positions))
    return kept


def test_the_sample_of_dialogues_with_as_many_tokens_is_uniform():
    kept = sample(5000, 4, [3] * 50, seed=0)
    of_dialogues = kept.dialogues.flatten().bincount(minlength=50).double()
    # without replacement each group takes 4 of 50, so that the counts vary by 46/49 of what independent ones would
    assert chi_square(of_dialogues, torch.full((50,), 400.0)) < LEVEL
    of_positions = kept.positions.flatten().bincount(minlength=3).double()
    assert chi_square(of_positions, torch.full((3,), 20_000 / 3)) < LEVEL


def test_the_first_token_of_the_sample_is_uniform_over_tokens_and_later_ones_skip_dialogues_drawn_before():
    tokens_of = [1, 2, 3, 4, 10]
    kept = sample(20_000, 2, tokens_of, seed=1)
    first, second = kept.keys.sort(dim=1).indices.unbind(1)
    groups = torch.arange(20_000)
    starts = torch.tensor([0, 1, 3, 6, 10])
    token = starts[kept.dialogues[groups, first].long()] + kept.positions[groups, first]
    assert chi_square(token.bincount(minlength=20).double(), torch.full((20,), 1000.0)) < LEVEL
    shares = torch.tensor(tokens_of) / 20
    pairs = kept.dialogues[groups, first] * 5 + kept.dialogues[groups, second]
    expected = (shares[:, None] * shares / (1 - shares[:, None]))[~torch.eye(5, dtype=torch.bool)] * 20_000
    counts = pairs.bincount(minlength=25).view(5, 5)
    assert not counts.diagonal().any()
    assert chi_square(counts[~torch.eye(5, dtype=torch.bool)].double(), expected) < LEVEL


def test_the_chi_square_test_notices_a_sample_that_is_not_uniform():
    even = torch.full((50,), 400.0)
    assert chi_square(even * torch.linspace(0.8, 1.2, 50), even) > LEVEL
