"""Sets of options that a run may start from."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    # arXiv:2506.07691, appendices A and C; its penalty is weak, so look at L0
    "fast-paper": {
        "bandwidth": 0.001,
        "init_threshold": 0.001,
        "normalize_activations": False,
        "drop_first_position": False,
        "max_norm_multiple": None,
        "init_l0": None,
        "tokens": 40_960_000,
        "batch_size": 128,
        "lr": 7e-5,
        "warm_up": 0.05,
        "decay": 0.2,
        "sparsity": "step",
        "l0_coefficient": 0.01,
        "sparsity_warm_up": 10_000 / 320_000,
    },
}
