"""A whole training run in a process of its own: `fastsae train`, or SAELens' runner on the same model, dialogues and SAEs.

    python -m benchmarks.runs RUNNER RUN STARTED    # RUN is JSON, the fields of `Run`; its last line is JSON, those of `Took`

A run's time is that of its process, from its start to the last file of its SAEs: imports, loading of the model and the dialogues,
ours with its dedup, its checks and its checkpoint, the tokens, the model's forward passes, the buffer, the steps, the files.
Neither side evaluates: of ours, which always does, one dialogue is evaluated, and that time is taken off. The model computes in
fp32 on both sides. Timers stand around calls of both libraries; one that runs stops the one around it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# nothing else is imported here: what a library imports is a part of its run

ROOT = Path(__file__).parents[1]
LR, TARGET_L0, BATCH_TOKENS, CONTEXT, FORWARD_TOKENS = 1e-3, 32, 4096, 256, 8192
MODEL, SAE, BUFFER, HOST, EVALUATION = "model", "SAE", "buffer", "host", "evaluation"
PARTS = (MODEL, SAE, BUFFER, HOST)  # what the time of a run is divided into


@dataclass(frozen=True)
class Run:
    """A run of either library."""

    model: str  # a folder of transformers
    layer: int  # the block whose output the SAEs learn
    d_in: int  # the width of the model
    d_sae: int
    tokens: int  # that each SAE is trained on
    buffer_tokens: int  # how many activations are mixed
    chats: str  # a folder with the dialogues, `train.jsonl`
    output: str  # the folder of the SAEs
    architecture: str = "jumprelu"  # or "topk"
    n_saes: int = 1  # that are trained on one stream
    batch_tokens: int = BATCH_TOKENS  # the tokens of a step
    cache: str = ""  # the folder of stored activations, for the runs that write or read them


@dataclass(frozen=True)
class Took:
    """What a run took."""

    parts: dict[str, float]  # seconds by part, the evaluation left out; their sum is the time of the run
    peak_mib: float | None  # the most memory that the process has held at a time; None where the system does not tell
    tokens: int  # that each SAE was trained on
    n_saes: int
    padding_share: float | None  # in the tokens that the model computed; None where there is no such number

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def take(runner: str, run: Run) -> Took:
    """Runs it in a process of its own, with the hub and wandb switched off.

    Raises:
        RuntimeError: It failed; the message is its last line.
    """
    command = [sys.executable, "-m", "benchmarks.runs", runner, json.dumps(asdict(run)), repr(time.monotonic())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return Took(**json.loads(done.stdout.splitlines()[-1]))


class Clock:
    """Seconds by part; a part stops while another one that it calls runs."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running, self._since = [HOST], started

    def _switch(self) -> None:
        now = time.monotonic()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrap(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return timed

    def watch(self, owner: Any, part: str, *names: str) -> None:
        """Times a module's functions or a class's methods."""
        for name in names:
            setattr(owner, name, self.wrap(getattr(owner, name), part))

    def items(self, source: Iterator[Any], part: str) -> Iterator[Any]:
        """Times what it takes to get the items."""
        return iter(self.wrap(lambda: next(source, None), part), None)

    def stop(self) -> dict[str, float]:
        self._switch()
        return {part: seconds for part, seconds in self.seconds.items() if part != EVALUATION}


# ---- fastsae


def fastsae(run: Run, clock: Clock, command: str = "train", *flags: str) -> float | None:
    """`fastsae train` with its defaults, but for what both sides share; or `fastsae cache`, which has no SAE."""
    from fastsae.cli import main
    from fastsae.imports import import_for_good

    import_for_good(model=True)  # as the command does, before the timers' own imports
    from fastsae.data.cache import CachedActivations
    from fastsae.data.sequencing import Sequencer
    from fastsae.train import caching, supply
    from fastsae.train import run as whole
    from fastsae.train.trainer import Trainer

    for module in (supply, caching):
        clock.watch(module, MODEL, "read_layers")
    clock.watch(CachedActivations, BUFFER, "read")
    clock.watch(supply.Supply, BUFFER, "serve")
    clock.watch(Sequencer, HOST, "__next__")
    clock.watch(Trainer, SAE, "initialize", "advance")
    clock.watch(whole, EVALUATION, "evaluate_saes")
    options: dict[str, Any] = {
        "model": run.model, "model-dtype": "float32", "dataset": f"{run.chats}/train.jsonl", "tokens": run.tokens,
        "forward-tokens": FORWARD_TOKENS, "eval-dialogues": 1, "data-seed": 0,
    }  # fmt: skip
    if command == "train":
        options |= {
            "layer": run.layer, "architecture": run.architecture, "d-sae": run.d_sae, "lr": LR, "output": run.output,
            "k" if run.architecture == "topk" else "target-l0": TARGET_L0, "batch-size": run.batch_tokens,
            "buffer-tokens": run.buffer_tokens, "seeds": ",".join(map(str, range(run.n_saes))),
        }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    if status := main([command, *flags, *arguments, "--quiet"]):
        sys.exit(status)
    if command == "cache":
        return None
    metrics = json.loads((Path(run.output) / "metrics.json").read_text())
    share: float = (metrics if run.n_saes == 1 else metrics["saes"]["seed-0"])["padding_share"]
    return share


# ---- SAELens


def saelens(run: Run, clock: Clock) -> float | None:
    """`LanguageModelSAETrainingRunner`, or `MultiSAETrainingRunner` for several, without wandb."""
    from benchmarks.peers import load

    library = load("sae_lens")
    from sae_lens.config import LoggingConfig
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.sae_trainer import SAETrainer

    clock.watch(ActivationsStore, MODEL, "get_activations", "get_multi_hook_activations")
    clock.watch(ActivationsStore, HOST, "get_batch_tokens")
    clock.watch(ActivationsStore, BUFFER, "__next__")
    loader = ActivationsStore.get_multi_hook_data_loader
    ActivationsStore.get_multi_hook_data_loader = lambda store: clock.items(loader(store), BUFFER)  # type: ignore[method-assign]
    clock.watch(SAETrainer, SAE, "step")
    steps = run.tokens // run.batch_tokens
    shared = {
        "model_name": run.model, "model_class_name": "AutoModelForCausalLM", "dataset_path": run.chats,
        "model_from_pretrained_kwargs": {"dtype": "float32"}, "use_chat_formatting": True, "streaming": True,
        "context_size": CONTEXT, "training_tokens": run.tokens, "train_batch_size_tokens": run.batch_tokens,
        "n_batches_in_buffer": run.buffer_tokens // CONTEXT, "store_batch_size_prompts": FORWARD_TOKENS // CONTEXT,
        "lr": LR, "lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": steps // 20, "lr_decay_steps": steps // 5,
        "prepend_bos": False, "sequence_separator_token": None, "checkpoint_path": None, "output_path": run.output,
        "n_batches_for_norm_estimate": 1, "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    sae: dict[str, Any] = {"d_in": run.d_in, "d_sae": run.d_sae, "normalize_activations": "expected_average_only_in"}
    hook = f"model.layers.{run.layer}"

    def config() -> Any:
        if run.architecture == "topk":
            return library.TopKTrainingSAEConfig(k=TARGET_L0, **sae)
        quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": TARGET_L0}
        return library.JumpReLUTrainingSAEConfig(**quadratic, **sae)

    if run.n_saes == 1:
        options = {"hook_name": hook, "is_dataset_tokenized": False, "verbose": False}
        runner = library.LanguageModelSAETrainingRunner
        runner(library.LanguageModelSAERunnerConfig(sae=config(), **options, **shared)).run()
    else:
        saes = {f"seed-{seed}": config() for seed in range(run.n_saes)}
        multi = load("sae_lens.multi_sae_training_runner")
        settings = multi.MultiSAETrainingRunnerConfig(saes=saes, hook_names=hook, **shared)
        multi.MultiSAETrainingRunner(settings).run()
    return None


RUNNERS: dict[str, Callable[[Run, Clock], float | None]] = {
    "sae-lens": saelens,
    "fastsae": fastsae,
    "packed": lambda run, clock: fastsae(run, clock, "train", "--sequencing", "packed"),
    "cache": lambda run, clock: fastsae(run, clock, "cache", run.cache, "--layers", str(run.layer)),
    "cached": lambda run, clock: fastsae(run, clock, "train", "--activations", run.cache),
}


def main() -> None:
    runner, fields, started = sys.argv[1:]
    clock, run = Clock(float(started)), Run(**json.loads(fields))
    padding_share = RUNNERS[runner](run, clock)
    parts = clock.stop()
    from benchmarks.peak import process_peak_mib

    print(json.dumps(asdict(Took(parts, process_peak_mib(), run.tokens, run.n_saes, padding_share))))


if __name__ == "__main__":
    main()
