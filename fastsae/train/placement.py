"""Which of several SAEs each group of processes trains."""

from __future__ import annotations

from collections.abc import Mapping


def placed(costs: Mapping[str, float], n_groups: int) -> dict[str, int]:
    """The group that trains each SAE: the SAE that costs most comes first, and each goes to the group with the least work so far.

    Ties go to the lower group. The group with most work then has at most 4/3 of the least that is possible.

    Args:
        costs: What a step of each SAE costs, by name.
        n_groups: How many groups there are, at most as many as SAEs.

    Source:
        Graham 1969, "Bounds on multiprocessing timing anomalies".
    """
    load = [0.0] * n_groups
    found = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        group = min(range(n_groups), key=lambda group: load[group])
        load[group] += costs[name]
        found[name] = group
    return found
