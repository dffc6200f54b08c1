"""Kills tiny runs at their file operations and compares what is resumed with a run that nobody killed; see test_kill.py.

A program of its own with one thread, which forks a child per run: that spares the imports, and threads do not survive it.

    python tests/train/killed_runs.py MODEL CHATS FOLDER MOMENTS ARCHITECTURE SEQUENCING

MOMENTS: so many, evenly spread, or `all`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stopped_runs import without_times

from fastsae.data import stream
from fastsae.train import run
from fastsae.train.config import TOPK_FAMILY, TrainConfig
from fastsae.train.folder import FILES, SAES_FILE, is_new, read_config
from fastsae.train.trainer import Trainer

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


def in_child(action: Callable[[], None]) -> int:
    """Runs `action` in a fork; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Operations:
    """Counts what touches files under `folder`, and kills the process before the operation number `last`."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder, self.last, self.count = str(folder), last, 0
        self._fsync = os.fsync
        os.fsync = self._watched_fsync
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED and any(str(argument).startswith(self.folder) for argument in arguments[:2]):
            self._operation(str(arguments[0]) if event == "os.chmod" else None)

    def _watched_fsync(self, handle: int) -> None:
        self._operation(None)
        self._fsync(handle)

    def _operation(self, written: str | None) -> None:
        self.count += 1
        if self.count == self.last:
            if written is not None:  # killed in the middle of writing it
                os.truncate(written, os.path.getsize(written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def result(output: Path, trainer: Trainer) -> dict[str, Any]:
    """All that must not depend on kills: weights, metrics and curves without times, names of files."""
    metrics = json.loads((output / "metrics.json").read_text())
    return {
        "weights": (output / "sae_weights.safetensors").read_bytes().hex(),
        "metrics": without_times(metrics),
        "history": [without_times(row) for row in trainer.history],
        "files": sorted(path.name for path in output.iterdir()),
    }


def main(model: str, chats: str, folder: Path, moments: str, architecture: str, sequencing: Any) -> None:
    """Prints a summary as JSON; a difference ends it with an AssertionError."""
    torch.set_num_threads(1)
    stream.SAMPLE_TOKENS = 50  # so that the first piece of so short a run is not all of it
    config = TrainConfig(
        model=model, dataset=chats, eval_dialogues=4, d_sae=32, tokens=32 * 6, batch_size=32, buffer_tokens=64,
        forward_tokens=64, init_l0=8, target_l0=4, log_every=2, checkpoint_every=2, device="cpu",
        sequencing=sequencing, block_length=16, architecture=architecture, k=4 if architecture in TOPK_FAMILY else None,
    )  # fmt: skip
    pipeline = run.build_pipeline(config)
    run.build_pipeline = lambda *configs, **_: pipeline  # the model is loaded once
    trainers: list[Trainer] = []
    made = Trainer.__init__

    def remembered(self: Trainer, *arguments: Any) -> None:
        trainers.append(self)
        made(self, *arguments)

    Trainer.__init__ = remembered  # type: ignore[method-assign]
    counted, told = folder / "count", folder / "result.json"

    def start(output: Path, last: int | None, *, resume: bool) -> int:
        def action() -> None:
            operations = Operations(output, last)
            run.train(
                read_config(output) if (output / "config.json").exists() else config,
                output,
                resume=resume,
                progress=False,
            )
            told.write_text(json.dumps(result(output, trainers[0])))
            counted.write_text(str(operations.count))

        return in_child(action)

    assert start(folder / "whole", None, resume=False) == 0
    whole, n_operations = json.loads(told.read_text()), int(counted.read_text())
    assert whole["files"] == sorted(set(FILES) - {SAES_FILE})
    n_moments = n_operations if moments == "all" else min(n_operations, int(moments))
    n_resumed = n_again = n_complete = 0
    for i in range(n_moments):
        output, last = folder / "killed", 1 + i * n_operations // n_moments
        status = start(output, last, resume=False)
        assert status == -signal.SIGKILL, f"operation {last}: status {status}"
        if i % 3 == 0 and not is_new(output) and not (output / "metrics.json").exists():
            status = start(output, 1 + (7 * i) % 20, resume=True)  # killed again while it is resumed
            assert status == -signal.SIGKILL, f"operation {last}, second kill: status {status}"
        if (output / "metrics.json").exists():  # the run was complete, but for what it would have removed
            assert start(output, None, resume=True) != 0
            assert sorted(path.name for path in output.iterdir()) == sorted(set(FILES) - {SAES_FILE})
            n_complete += 1
        else:
            is_untouched = is_new(output)
            told.unlink()
            status = start(output, None, resume=not is_untouched or i % 2 == 0)
            assert status == 0, f"operation {last}: not resumed"
            assert json.loads(told.read_text()) == whole, f"operation {last}: another result"
            n_resumed, n_again = n_resumed + (not is_untouched), n_again + is_untouched
        shutil.rmtree(output)
    print(json.dumps({  # noqa: T201
        "operations": n_operations, "kills": n_moments, "resumed": n_resumed, "started again": n_again, "complete": n_complete,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
