"""The folder of a run: what is said of a folder that holds something else."""

import pytest

from fastsae.errors import FastsaeError
from fastsae.train.folder import read_config


@pytest.mark.parametrize("content", ['{"model_type": "qwen2", "vocab_size": 10}', "{}"])
def test_config_of_a_language_model_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FastsaeError, match=r"config\.json: expected the options of a run.*it has no model"):
        read_config(tmp_path)
