"""The folder of a run: what is said of a folder that holds something else."""

import json
from pathlib import Path

import pytest

from fastsae.errors import FastsaeError
from fastsae.train.config import TrainConfig
from fastsae.train.folder import read_config, write_configs


@pytest.mark.parametrize("content", ['{"model_type": "qwen2", "vocab_size": 10}', "{}"])
def test_config_of_a_language_model_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FastsaeError, match=r"config\.json: expected the options of a run.*it has no model"):
        read_config(tmp_path)


def test_a_run_of_an_older_version_has_the_defaults_of_newer_options(tmp_path: Path) -> None:
    write_configs(tmp_path, {"": TrainConfig(seed=7, lr=1e-4)}, {}, {})
    saved = json.loads((tmp_path / "config.json").read_text())
    for newer in ("hook", "init_from", "prefetch", "frozen", "random_model"):
        del saved[newer]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path) == TrainConfig(seed=7, lr=1e-4)
    del saved["architecture"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(FastsaeError, match="it has no architecture; is it that of a language model"):
        read_config(tmp_path)
