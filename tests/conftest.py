"""All cores, a worker on each; Triton's interpreter where there is no GPU; a tiny chat model and dataset on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from browser import Browser

# before anything imports Triton: it decides at decoration whether a function is interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# without it, cuBLAS refuses to multiply in deterministic mode; it is read when a process first uses the GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


pytest_plugins = ["race_detector"]  # does nothing where kernels are compiled

MOST_WORKERS = 16  # each takes a second of imports and half a gigabyte


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Without `-n`, as many workers as there are cores, each with one thread; one process with the GPU where there is one.

    Here and not in pyproject.toml, so that `pytest benchmarks/` has the machine to itself, and so that a machine without
    pytest-xdist runs the tests too.
    """
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    options = config.option
    alone = torch.cuda.is_available() or options.collectonly or options.usepdb
    if options.numprocesses is None and options.dist == "no" and not options.tx and not alone:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.numprocesses, options.dist = min(cores, MOST_WORKERS), "worksteal"
    if options.numprocesses:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before the workers import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run: a value within rounding of a threshold would make a test fail now and then."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless browser for the tests of pages."""
    from browser import Browser, find_browser  # it needs a system with pipes of POSIX

    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is on the path")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Qwen2 model with the embedded model's tokenizer."""
    import transformers

    from fastsae.data import demo

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_path())
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 40 short dialogues."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(40):
            turns = [
                {"role": "user", "content": f"What is number {i} plus {i * 3} in words, please?"},
                {"role": "assistant", "content": f"It is {i * 4}; that is number {i} of the list, " * (1 + i % 4)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
