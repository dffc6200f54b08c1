"""The peers' own training steps as they are and accelerated: sae-lens, dictionary-learning, eai-sparsify.

Only public code of the peers is called, with their defaults: penalty, rescaling by decoder norms, optimiser, statistics. All get
the same weights. Nothing goes online: they are imported with the Hugging Face Hub and wandb switched off, and on a CPU
eai-sparsify without its Triton kernel, which needs CUDA.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count, repeat
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fastsae
from benchmarks.shapes import DEVICE, Shape, parameters
from benchmarks.steps import Make, Training

LR = 1e-4
MANY_STEPS = 2**30  # a run is given so many steps that no schedule ends while it is timed
IMPORTS = {"sae-lens": "sae_lens", "dictionary-learning": "dictionary_learning", "eai-sparsify": "sparsify"}


def load(module: str) -> Any:
    """Imports a peer's module, offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    if DEVICE == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read when eai-sparsify is imported
    with _without_nnsight():
        return importlib.import_module(module)


@contextmanager
def _without_nnsight() -> Iterator[None]:
    """dictionary-learning names one class of it in annotations; to import it breaks `torch.compile` for the whole process."""
    if "nnsight" in sys.modules:
        yield
        return
    stand_in = ModuleType("nnsight")
    stand_in.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules["nnsight"] = stand_in
    try:
        yield
    finally:
        del sys.modules["nnsight"]


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@cache  # a second attempt would meet half-imported modules, and say so instead of why
def why_not(package: str) -> str | None:
    """Returns why a peer cannot run here, in one sentence; None where it can."""
    if not _is_installed(package):
        return f"{package} is not installed (pip install 'fastsae-kernels[bench-peers]')"
    try:
        load(IMPORTS[package])
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # transformers wraps the error that tells
            root = root.__cause__
        message = f"{type(root).__name__}: {(str(root).splitlines() or [''])[0]}"
        # nnsight brings it, built for another torch, and transformers imports it where it is
        hint = "; 'pip uninstall torchvision' mends it" if "torchvision" in message else ""
        return f"{package} {version(package)} cannot be imported ({message}{hint})"
    return None


def saelens(architecture: str, shape: Shape, dtype: torch.dtype) -> Training:
    """`SAETrainer.step`: forward, firing statistics, backward, clipping to 1.0, `torch.optim.Adam`, schedulers."""
    library, n = load("sae_lens"), shape.n_tokens
    options = {} if architecture == "JumpReLU" else {"k": round(shape.l0)}
    sae = _saelens_sae(f"{architecture}TrainingSAE", shape, dtype, **options)
    config = load("sae_lens.config").SAETrainerConfig(MANY_STEPS * n, n, lr=LR, lr_end=LR, device=DEVICE)
    trainer = load("sae_lens.training.sae_trainer").SAETrainer(config, sae, data_provider=repeat(None))
    make_input = library.saes.sae.TrainStepInput
    options = {"dead_neuron_mask": None, "n_training_steps": 0, "is_logging_step": False}

    def loss(x: Tensor) -> Tensor:
        return sae.training_forward_pass(make_input(x, trainer.get_coefficients(), **options)).loss

    return Training(sae, lambda x: trainer.step(x), loss, trainer)


def _saelens_sae(name: str, shape: Shape, dtype: torch.dtype, **options: Any) -> nn.Module:
    library = load("sae_lens")
    shared = {"d_in": shape.d_in, "d_sae": shape.d_sae, "dtype": str(dtype).removeprefix("torch."), "device": DEVICE}
    return getattr(library, name)(getattr(library, f"{name}Config")(**shared, **options))


def saelens_pair(shape: Shape, dtype: torch.dtype) -> Training:
    """`decode(encode(x))` as SAELens' transformer, its evaluations and SAEBench call it."""
    sae = _saelens_sae("JumpReLUSAE", shape, dtype)

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x))

    return Training(sae, step, target=sae)


def dictionary_learning(module: str, trainer: str, shape: Shape, dtype: torch.dtype) -> Training:
    """A trainer's `update` as after warm-up; it ends with the decoder at unit norm, and reads the loss back."""
    trainer_class = getattr(load(f"dictionary_learning.trainers.{module}"), trainer)
    options: dict[str, Any] = {} if module == "jumprelu" else {"k": round(shape.l0)}
    sizes = {"activation_dim": shape.d_in, "dict_size": shape.d_sae, "steps": MANY_STEPS}
    made = trainer_class(**sizes, lr=LR, warmup_steps=0, device=DEVICE, layer=0, lm_name="", **options)
    made.ae.to(dtype)
    steps = count(10_000)
    return Training(made.ae, lambda x: made.update(next(steps), x), lambda x: made.loss(x, step=10_000), made)


def sparsify(shape: Shape, dtype: torch.dtype) -> Training:
    """What `Trainer.fit` does with a batch of activations, without model, mask and DDP.

    That is: decoder to unit norm, forward, fired features, the FVU read back for the log, backward, projection of the
    decoder's gradient, the default optimiser (schedule-free SignSGD with momentum 0.95), token counts of features.
    """
    library = load("sparsify")
    sae = library.SparseCoder(
        shape.d_in, library.SparseCoderConfig(num_latents=shape.d_sae, k=round(shape.l0)), DEVICE, dtype
    )
    sign = load("sparsify.sign_sgd").SignSGD(sae.parameters(), lr=LR)
    optimizer = load("schedulefree").ScheduleFreeWrapper(sign, momentum=0.95)
    optimizer.train()
    n_since_fired = torch.zeros(shape.d_sae, dtype=torch.long, device=DEVICE)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x)
        fired = torch.zeros_like(n_since_fired, dtype=torch.bool)
        fired[output.latent_indices.flatten()] = True
        output.fvu.item()
        output.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        n_since_fired.add_(x.shape[0]).masked_fill_(fired, 0)

    return Training(sae, step, lambda x: sae(x).fvu, sae)


@dataclass(frozen=True)
class Peer:
    """What is timed of a peer, and how many times as fast it should become at the larger shape."""

    package: str
    what: str
    make: Make
    goal: float
    has_optimizer: bool = False  # whether `accelerate` can put FusedSAEAdam in the place of its own

    @property
    def title(self) -> str:
        """Its name, and its version where it is installed."""
        return f"{self.package} {version(self.package)}" if _is_installed(self.package) else self.package

    def own(self, shape: Shape, dtype: torch.dtype) -> Training:
        """Returns the peer's object, with the weights of `benchmarks.shapes.parameters`."""
        found, p = self.make(shape, dtype), dict(parameters(shape))
        p |= {"encoder.weight": p["W_enc"].t(), "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].t()}
        with torch.no_grad():
            for name, parameter in found.module.named_parameters():
                parameter.copy_(p[name])
        return found

    def accelerated(self, shape: Shape, dtype: torch.dtype, optimizer: bool = False) -> Training:
        """Returns the same, accelerated."""
        found = self.own(shape, dtype)
        fastsae.accelerate(found.target, optimizer=optimizer)
        return found

    @property
    def is_inference(self) -> bool:
        return "encode" in self.what

    @property
    def architecture(self) -> str:
        return "jumprelu" if self.what.startswith("JumpReLU") else "topk"


PEERS = (
    Peer("sae-lens", "JumpReLU", partial(saelens, "JumpReLU"), 6.5, has_optimizer=True),
    Peer("sae-lens", "TopK", partial(saelens, "TopK"), 5.0, has_optimizer=True),
    Peer("sae-lens", "BatchTopK", partial(saelens, "BatchTopK"), 5.0, has_optimizer=True),
    Peer("dictionary-learning", "JumpReLU", partial(dictionary_learning, "jumprelu", "JumpReluTrainer"), 6.0),
    Peer("dictionary-learning", "TopK", partial(dictionary_learning, "top_k", "TopKTrainer"), 4.0),
    Peer("dictionary-learning", "BatchTopK", partial(dictionary_learning, "batch_top_k", "BatchTopKTrainer"), 4.0),
    Peer("eai-sparsify", "TopK", sparsify, 2.0),
    Peer("sae-lens", "JumpReLU, encode and decode", saelens_pair, 3.5),
)
