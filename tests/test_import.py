"""Names of the package are imported when they are first used, and are then like any other."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import fastsae

ROOT = Path(__file__).parents[1]


def test_every_name_is_found_and_listed() -> None:
    for name in fastsae.__all__:
        assert getattr(fastsae, name) is not None
    assert {*fastsae.__all__, "sae", "optim"} <= set(dir(fastsae))
    with pytest.raises(AttributeError, match="'fastsae' has no attribute 'FusedGatedSAE'"):
        fastsae.FusedGatedSAE  # noqa: B018
    with pytest.raises(ImportError):
        from fastsae import FusedGatedSAE  # noqa: F401


def test_classes_pickle_by_name() -> None:
    assert pickle.loads(pickle.dumps(fastsae.FusedJumpReLUSAE)) is fastsae.FusedJumpReLUSAE


def test_import_is_light_until_a_class_is_used() -> None:
    program = (
        "import sys, fastsae, fastsae.train\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from fastsae.train import TrainConfig\nTrainConfig()\nassert 'torch' not in sys.modules\n"
        "from fastsae import *\nassert FusedJumpReLUSAE is fastsae.sae.FusedJumpReLUSAE\n"
        "assert fastsae.train.Trainer.__name__ == 'Trainer'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
