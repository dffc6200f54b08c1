"""Importing the packages changes nothing of the process but `sys.modules`: its warnings, torch's options, its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

STATE = """
import importlib, locale, logging, os, pkgutil, random, signal, sys, threading, warnings
import numpy, safetensors.torch, torch

def state():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "filters": list(warnings.filters), "showwarning": warnings.showwarning, "environment": dict(os.environ),
        "excepthook": sys.excepthook, "path": list(sys.path), "recursion": sys.getrecursionlimit(),
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, "locale": locale.setlocale(locale.LC_ALL),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "random": (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "numpy": (numpy.geterr(), numpy.get_printoptions()), "threads": threading.enumerate(),
        "torch": (
            torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.is_warn_always_enabled(),
            torch.get_deterministic_debug_mode(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled(),
            torch.backends.mkldnn.enabled, cudnn.enabled, cudnn.benchmark, matmul.allow_tf32,
            torch.sparse.check_sparse_tensor_invariants.is_enabled(), repr(vars(torch._tensor_str.PRINT_OPTS)),
        ),
    }
"""
IMPORT_ALL = """
# Triton is optional, and so are the peers: a module of ours that imports one is only imported where the peer is already
OPTIONAL = ("fastsae_kernels.gpu", *(f"fastsae.peers.{name}" for name in ("dictionary_learning", "saelens", "sparsify")))

def import_all(*packages):
    for package in packages:
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            if not found.name.startswith(OPTIONAL):
                importlib.import_module(found.name)
"""


def run(program: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONWARNINGS")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=inherited, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_every_module_leaves_the_process_as_it_was() -> None:
    program = (
        "before = state()\nimport_all('fastsae', 'fastsae_kernels')\nafter = state()\n"
        "changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}\n"
        "assert not changed, changed\n"
    )
    assert run(STATE + IMPORT_ALL + program) == ""


def test_the_notice_on_sparse_tensors_is_not_shown_where_it_arises() -> None:
    """Not even where every warning is, and the filters of the process are as before."""
    program = (
        "import torch, warnings, fastsae_kernels as kernels\n"
        "from fastsae_kernels.cpu.product import sampled_dot\n"
        "warnings.simplefilter('always')\nbefore = list(warnings.filters)\n"
        "ones = torch.ones(2, 3)\n"
        "assert sampled_dot(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), ones, ones).tolist() == [3.0, 3.0]\n"
        "assert warnings.filters == before\n"
    )
    assert run(program) == ""
