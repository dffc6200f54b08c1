"""The real peers with our weights behind one interface: sae-lens, eai-sparsify, dictionary-learning; and ours against each.

Only public code of the peers is called, none of it is repeated here. Take one object per measurement: a step changes its
weights, and its optimiser may keep the gradients. Nothing goes online: they are imported with the Hugging Face Hub and wandb
switched off, and on a CPU eai-sparsify without its Triton kernel, which needs CUDA.

What differs from peer to peer in a training pass, beyond its speed:

    sae-lens              numbers as ours; writes dense activations
    eai-sparsify          loss is the fraction of variance unexplained, see `loss_scale`; on a GPU always in bf16, which its
                          forward switches on; a chosen feature with value 0 still gets a gradient, so k must be well below
                          the number of positive pre-activations
    dictionary-learning   JumpReLU: penalty is quadratic in the batch's mean L0, and its straight-through step sees the gated
                          activations, so the threshold's gradient lacks the lower half of the window; see its `reference`
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count, repeat
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from benchmarks.adapters import (
    LINEAR_ENCODER,
    LR,
    SAME_NAMES,
    WITH_THRESHOLD,
    Adapter,
    Expected,
    Fused,
    check,
    squared_error,
)  # fmt: skip
from benchmarks.baselines import L0_COEFFICIENT, Parameters
from benchmarks.harness import Call, Provider
from benchmarks.shapes import BANDWIDTH, DEVICE, HEADLINE, Shape, parameters, tokens
from fastsae_kernels import reference

MANY_STEPS = 2**30  # a run is given so many steps that no schedule ends while it is timed


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


@cache  # a second attempt would meet half-imported modules, and say so instead of why
def _import_failure(module: str) -> str | None:
    try:
        load(module)
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # transformers wraps the error that tells
            root = root.__cause__
        message = f"{type(root).__name__}: {(str(root).splitlines() or [''])[0]}"
        # nnsight brings it, built for another torch, and transformers imports it where it is
        return f"{message}; 'pip uninstall torchvision' mends it" if "torchvision" in message else message
    return None


class Peer(Adapter):
    """A library's SAE of an architecture."""

    package: ClassVar[str]
    import_name: ClassVar[str]
    adam: ClassVar[dict[str, Any]]  # options of the FusedSAEAdam that does what its step does

    @classmethod
    def version(cls) -> str:
        return version(cls.package)

    @classmethod
    def not_installed(cls) -> str | None:
        """Why it cannot run, as far as can be told without importing it; else None."""
        try:
            cls.version()
        except PackageNotFoundError:
            return f"{cls.package} is not installed (pip install 'fastsae-kernels[bench-peers]')"
        return None

    @classmethod
    def why_not(cls) -> str | None:
        """Why it cannot run here, in one sentence; None where it can."""
        if (reason := cls.not_installed()) is not None:
            return reason
        failure = _import_failure(cls.import_name)
        return failure and f"{cls.package} {cls.version()} cannot be imported ({failure})"

    @classmethod
    def ours(cls, parameters: Parameters, shape: Shape) -> Fused:
        """Returns the same architecture of ours, whose step does the same: clipping and unit norm as the peer's."""
        return Fused(cls.architecture, cls.adam, parameters, shape)


class SAELens(Peer):
    """`TrainingSAE.training_forward_pass`; at inference the class that it is saved as.

    A step is `SAETrainer.step`: forward, firing statistics, backward, clipping to 1.0, `torch.optim.Adam`, schedulers.
    """

    name, package, import_name = "sae-lens", "sae-lens", "sae_lens"
    adam: ClassVar = {"max_grad_norm": 1.0}
    classes: ClassVar[tuple[str, str]]  # in training and at inference; their configs are named after them

    def _build(self, class_name: str, **options: Any) -> Any:
        library = load(self.import_name)
        shared = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        config_class = getattr(library, class_name + "Config")
        config = config_class(d_in=self.shape.d_in, d_sae=self.shape.d_sae, **shared, **self._options(), **options)
        return getattr(library, class_name)(config)

    def _options(self) -> dict[str, Any]:
        return {"apply_b_dec_to_input": False}

    def _make(self) -> nn.Module:
        return self._build(self.classes[0])

    @cached_property
    def _inference(self) -> Any:
        sae = self._build(self.classes[1])
        sae.load_state_dict(self.module.state_dict(), assign=True)
        return sae

    def _loss(self, x: Tensor) -> Tensor:
        make_input, coefficients = load("sae_lens.saes.sae").TrainStepInput, {"l0": L0_COEFFICIENT}
        step_input = make_input(x, coefficients, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
        return self.module.training_forward_pass(step_input).loss

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self._inference.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self._inference(x)

    def _make_step(self) -> Callable[[Tensor], object]:
        n = self.shape.n_tokens
        # without lr_end its own assertion fails
        options = {"lr": LR, "lr_end": LR, "device": str(self.device)}
        config = load("sae_lens.config").SAETrainerConfig(MANY_STEPS * n, n, **options)
        return load("sae_lens.training.sae_trainer").SAETrainer(config, self.module, data_provider=repeat(None)).step


class SAELensJumpReLU(SAELens):
    """Its default, the `step` penalty."""

    architecture, names = "jumprelu", WITH_THRESHOLD
    classes = "JumpReLUTrainingSAE", "JumpReLUSAE"

    def _make(self) -> nn.Module:
        return self._build(self.classes[0], jumprelu_bandwidth=BANDWIDTH, l0_coefficient=L0_COEFFICIENT)


class SAELensTopK(SAELens):
    """Without rescaling by decoder norms, its default, which the other peers lack."""

    architecture, names = "topk", SAME_NAMES
    classes = "TopKTrainingSAE", "TopKSAE"

    def _options(self) -> dict[str, Any]:
        return {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False, "k": self.k}


class SparsifyTopK(Peer):
    """`SparseCoder` with its default options.

    A step is what `Trainer.fit` does with a batch of activations, without model, mask and DDP: decoder to unit norm, forward,
    fired features, the FVU read back for the log, backward, projection of the decoder's gradient, the default optimiser
    (schedule-free SignSGD with momentum 0.95), token counts of features. `fit` on a CPU ends with bitwise the same weights; on
    a GPU it would also allow tf32 products everywhere, which is left out.
    """

    name, package, import_name = "eai-sparsify, SignSGD", "eai-sparsify", "sparsify"
    architecture = "topk"
    names: ClassVar = {**LINEAR_ENCODER, "W_dec": "W_dec", "b_dec": "b_dec"}
    adam: ClassVar = {"normalize_decoder": True}
    trains_in_bf16 = DEVICE == "cuda"

    def _make(self) -> nn.Module:
        library = load(self.import_name)
        config = library.SparseCoderConfig(num_latents=self.shape.d_sae, k=self.k)
        return library.SparseCoder(self.shape.d_in, config, self.device, self.dtype)

    def _loss(self, x: Tensor) -> Tensor:
        return self.module(x).fvu

    def loss_scale(self, x: Tensor) -> float:
        """The variance per token: its loss is the sum of squared errors over the batch's total variance."""
        return ((x - x.mean(0)).square().sum() / x.shape[0]).item()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        encoded = self.module.encode(x)
        zeros = encoded.top_acts.new_zeros(x.shape[0], self.shape.d_sae)
        return zeros.scatter_(1, encoded.top_indices, encoded.top_acts)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        encoded = self.module.encode(x)  # its forward would compute the loss too
        return self.module.decode(encoded.top_acts, encoded.top_indices)

    def _optimizer(self) -> torch.optim.Optimizer:
        sign = load("sparsify.sign_sgd").SignSGD(self.module.parameters(), lr=LR)
        optimizer = load("schedulefree").ScheduleFreeWrapper(sign, momentum=0.95)
        optimizer.train()
        return optimizer

    def _make_step(self) -> Callable[[Tensor], object]:
        sae, optimizer = self.module, self._optimizer()
        n_since_fired = torch.zeros(self.shape.d_sae, dtype=torch.long, device=self.device)

        def step(x: Tensor) -> float:
            sae.set_decoder_norm_to_unit_norm()
            output = sae(x)
            fired = torch.zeros_like(n_since_fired, dtype=torch.bool)
            fired[output.latent_indices.flatten()] = True
            fvu = output.fvu.item()
            output.fvu.backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            n_since_fired.add_(x.shape[0]).masked_fill_(fired, 0)
            return fvu

        return step


class SparsifyTopKAdam(SparsifyTopK):
    """With `optimizer="adam"`, in 32 bits, to compare like with like."""

    name = "eai-sparsify, Adam"

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.module.parameters(), lr=LR)


class DictionaryLearning(Peer):
    """A trainer's `loss`. Its module is the trainer's `ae`.

    A step is the trainer's `update` as after warm-up: forward, firing statistics, backward, projection of the decoder's
    gradient, clipping to 1.0, Adam, decoder to unit norm; it reads the loss back.
    """

    name, package, import_name = "dictionary-learning", "dictionary-learning", "dictionary_learning"
    adam: ClassVar = {"max_grad_norm": 1.0, "normalize_decoder": True}

    def _train(self, trainer_class: type, ae: nn.Module, **options: Any) -> nn.Module:
        sizes = {"steps": MANY_STEPS, "activation_dim": self.shape.d_in, "dict_size": self.shape.d_sae}
        options |= {"lr": LR, "warmup_steps": 0, "device": str(self.device), "layer": 0, "lm_name": ""}
        self._trainer = trainer_class(**sizes, dict_class=lambda *args, **kwargs: ae, **options)
        return ae

    def _loss(self, x: Tensor) -> Tensor:
        return self._trainer.loss(x, step=0)

    def _make_step(self) -> Callable[[Tensor], object]:
        steps = count(1)  # step 0 would set b_dec to a median of the batch

        def step(x: Tensor) -> float:
            return self._trainer.update(next(steps), x)

        return step


class DictionaryLearningJumpReLU(DictionaryLearning):
    """With our bandwidth, and a penalty whose pull at the shape's L0 is that of `L0_COEFFICIENT * L0`."""

    architecture, names = "jumprelu", WITH_THRESHOLD
    adam: ClassVar = {**DictionaryLearning.adam, "betas": (0.0, 0.999)}

    def _make(self) -> nn.Module:
        self._target = self.shape.l0 / 2  # at the shape's L0 itself the penalty would be 0, and its gradient rounding
        self._penalty_coefficient = L0_COEFFICIENT * self._target / 2
        ae = load(self.import_name).JumpReluAutoEncoder(self.shape.d_in, self.shape.d_sae, self.device).to(self.dtype)
        penalty = {"sparsity_penalty": self._penalty_coefficient, "target_l0": self._target}
        trainer_class = load("dictionary_learning.trainers.jumprelu").JumpReluTrainer
        return self._train(trainer_class, ae, bandwidth=BANDWIDTH, sparsity_warmup_steps=0, **penalty)

    def reference(self, x: Tensor, p: Parameters) -> Expected:
        pre = reference.hidden_pre(x, p["W_enc"], p["b_enc"])
        acts = reference.JumpReLU.apply(pre, p["threshold"], BANDWIDTH, False)
        l0 = reference.Step.apply(acts, p["threshold"], BANDWIDTH, False).sum(-1).mean()
        sae_out = reference.decode(acts, p["W_dec"], p["b_dec"])
        penalty = self._penalty_coefficient * (l0 / self._target - 1).square()
        return Expected(acts, sae_out, squared_error(sae_out, x) + penalty)


class DictionaryLearningTopK(DictionaryLearning):
    """A step also moves its inference threshold, and counts dead features, of which there are none yet."""

    architecture = "topk"
    names: ClassVar = {**LINEAR_ENCODER, "W_dec": "decoder.weight.T", "b_dec": "b_dec"}

    def _make(self) -> nn.Module:
        library = load("dictionary_learning.trainers.top_k")
        ae = library.AutoEncoderTopK(self.shape.d_in, self.shape.d_sae, self.k).to(self.device, self.dtype)
        return self._train(library.TopKTrainer, ae, k=self.k, threshold_start_step=0)


PEERS: tuple[type[Peer], ...] = (
    SAELensJumpReLU,
    DictionaryLearningJumpReLU,
    SAELensTopK,
    SparsifyTopK,
    SparsifyTopKAdam,
    DictionaryLearningTopK,
)

# peers take as long as dense PyTorch, and their check with fp64 longer
PEER_SHAPES = {"cpu": (HEADLINE, "demo"), "cuda": ("gpt2-small x32", "gemma-2-2b 16k")}[DEVICE]
Action = Literal["loss_and_backward", "train_step", "reconstruct"]


def _make(adapter: Callable[..., Adapter], shape: Shape, action: Action) -> Call:
    return partial(getattr(adapter(parameters(shape), shape), action), tokens(shape))


def _provider(adapter: Callable[..., Adapter], shape: Shape, action: Action, skip: Any = None) -> Provider:
    checks = partial(check, adapter, shape, training=action != "reconstruct")
    return Provider(partial(_make, adapter, shape, action), checks, "fp32", skip)


def _label(peer: type[Peer]) -> str:
    """The name, and the version where there is one."""
    package, comma, option = peer.name.partition(", ")
    return peer.name if peer.not_installed() else f"{package} {peer.version()}{comma}{option}"


def peer_providers(shape: Shape, architecture: str, action: Action) -> dict[str, Provider]:
    """Returns every peer that has the architecture, skipped with a reason where it is not installed."""
    found = [peer for peer in PEERS if peer.architecture == architecture]
    return {_label(peer): _provider(peer, shape, action, peer.why_not) for peer in found}


def our_provider(shape: Shape, architecture: str, action: Action) -> Provider:
    """Returns ours, with the options of the first such peer."""
    return _provider(next(peer for peer in PEERS if peer.architecture == architecture).ours, shape, action)
