"""Made-up sums of dialogues, of which the truth is known."""

import numpy as np
import pytest

from fastsae.evaluate.dialogues import CLASSES, FIELDS, DialogueSums

# share of a dialogue's tokens that are of a class; None where a dialogue has one such token
SHARES = {"all": 0.97, "special": 0.08, "user": 0.3, "assistant": 0.5, "template": 0.15, "sinks": None}
SHARES |= {"position_0": None, "all_with_sinks": 1.0, "special_with_sinks": 0.1}
D_IN = 64


def made_up_sums(n, error, *, seed=0, spread=0.1, l0=32.0, scale=1.0):
    """Sums of an SAE whose FVU is `error` but for noise; the dialogues are the same whatever the arguments are."""
    data, noise = np.random.default_rng(1), np.random.default_rng([seed, int(1e6 * error)])
    lengths = np.ceil(np.exp(data.normal(4.5, 0.8, n))) + 10
    values = np.zeros((n, len(CLASSES), len(FIELDS)))
    fields = {name: values[:, :, i] for i, name in enumerate(FIELDS)}
    for c, share in enumerate(SHARES[name] for name in CLASSES):
        tokens = np.ones(n) if share is None else np.ceil(share * lengths)
        targets = np.zeros(n) if share is None else tokens
        off = error * np.exp(noise.normal(-(spread**2) / 2, spread, n))
        fields["tokens"][:, c] = tokens
        fields["variance"][:, c] = tokens * scale * 170 * np.exp(data.normal(0, 0.4, n)) * (1 if share else 1e4)
        fields["squared_error"][:, c] = off * fields["variance"][:, c]
        fields["l0"][:, c] = tokens * (l0 + noise.normal(0, 2, n))
        fields["targets"][:, c] = targets
        fields["ce"][:, c] = targets * np.exp(data.normal(0.9, 0.2, n))
        fields["ce_spliced"][:, c] = fields["ce"][:, c] + 0.3 * off * targets
        fields["ce_zero"][:, c] = 10 * targets
        fields["kl"][:, c] = 0.4 * off * targets
    return DialogueSums(D_IN, values, np.arange(n))


@pytest.fixture(scope="session")
def made_up():
    return made_up_sums
