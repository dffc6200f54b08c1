"""A steering run from features and prompts to `steer.json` and its page: doses, controls, and how far one can push."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.progress import bar
from fastsae.data.tokens import render
from fastsae.disk import write_json
from fastsae.errors import UsageError
from fastsae.sae import SparseAutoencoder
from fastsae.steering.calibration import Calibration, calibrate, match
from fastsae.steering.doses import Controller, Decay, Fixed, KLCap, SetPoint
from fastsae.steering.edits import Edit, Mode, Unit
from fastsae.steering.measures import measure, measure_all, stable_range
from fastsae.steering.page import write_steer_page
from fastsae.steering.prompted import prompted_rollouts
from fastsae.steering.result import Auto, Result, Run, Stable, Text, Tried
from fastsae.steering.rollout import Rollout, roll_out
from fastsae.steering.select import Chosen
from fastsae.steering.steering import Steering, steer
from fastsae.version import __version__

RESULT_FILE, PAGE_FILE = "steer.json", "steer.html"
MULTIPLES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the strength that is found
DYNAMIC = ("decay", "kl_cap", "set_point")
_RANDOM = "random direction"
_MOST_NATS = 100.0
OnToken = Callable[[int, str], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is steered.

    Attributes:
        name: What the SAE is called.
        model_name: What the language model is called.
        sae: The SAE.
        residual: The language model, and where the SAE reads it.
        tokenizer: The model's.
        maxima: The largest activation that was seen of each chosen feature, where one was.
    """

    name: str
    model_name: str
    sae: SparseAutoencoder
    residual: ResidualStream
    tokenizer: Any
    maxima: Mapping[int, float]


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        chosen: The features, which are pushed together.
        prompts: What the user says.
        alphas: The doses; None looks for the strength whose KL is 1 nat at the 95th percentile, and takes multiples of it.
        mode: Of the edits.
        unit: Of alpha.
        positions: Which tokens are edited.
        dynamic: Doses that change while the text is written, from `DYNAMIC`; only with the mode "add".
        instruction: What the user adds for the prompted texts; None leaves them out.
        max_new_tokens: Of each text.
        temperature: 0 takes the likeliest token.
        seed: Determines draws, and the random direction.
    """

    chosen: tuple[Chosen, ...]
    prompts: tuple[str, ...]
    alphas: tuple[float, ...] | None = None
    mode: Mode = "add"
    unit: Unit = "absolute"
    positions: str = "all"
    dynamic: tuple[str, ...] = DYNAMIC
    instruction: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


def steer_texts(
    subject: Subject,
    plan: Plan,
    output: Path,
    *,
    streamed: Callable[[str], Any] | None = None,
    progress: bool = True,
) -> Result:
    """Writes texts with features pushed by several doses, beside those of the model as it is, and `steer.json` and a page.

    Args:
        subject: What is steered.
        plan: What is done.
        output: The folder of the two files.
        streamed: Gives, for the title of a run, a context manager whose value is told each piece of text; None tells nobody.
        progress: Show a progress bar.

    Raises:
        UsageError: An edit, a prompt or a dose does not fit, as the message says.
        FastsaeError: The model computed NaN.
    """
    check(plan)
    started = time.perf_counter()
    bench = _Bench(subject, plan, streamed)
    feature, random = _arms(subject, plan)
    auto = None
    if plan.alphas is None:
        auto = bench.calibrated(feature)
        plan = replace(plan, alphas=tuple(auto.alpha * multiple for multiple in MULTIPLES))
    alphas = plan.alphas or ()
    arms = [feature, random] if random else [feature]
    total = 1 + len(alphas) * len(arms) + bool(plan.instruction) + len(plan.dynamic)
    with bar("writing texts", "run", total=total, progress=progress and streamed is None) as advance:
        bench.advance = advance
        runs = [bench.unsteered()]
        if plan.instruction:
            runs.append(bench.prompted(plan.instruction))
        runs += [bench.fixed(arm, alpha) for arm in arms for alpha in alphas]
        stable = [_stable(arm.name, runs) for arm in arms]
        reference = _reference(runs, feature.name, stable[0], auto)
        if reference is not None:
            runs += bench.matched(feature, reference)
    result = _result(subject, plan, auto, runs, stable, time.perf_counter() - started)
    output.mkdir(parents=True, exist_ok=True)
    write_steer_page(output / PAGE_FILE, result)
    write_json(output / RESULT_FILE, result)
    return result


def check(plan: Plan) -> None:
    """Raises UsageError where parts of a plan contradict each other."""
    if not plan.prompts or not all(prompt.strip() for prompt in plan.prompts):
        raise UsageError("prompt: expected at least one that says something, got none")
    for alpha in plan.alphas or ():
        if not math.isfinite(alpha):
            raise UsageError(f"alpha: expected finite numbers, got {alpha}")
    if plan.alphas is not None and len(set(plan.alphas)) < len(plan.alphas):
        raise UsageError(f"alpha: expected each dose once, got {', '.join(f'{alpha:g}' for alpha in plan.alphas)}")
    if unknown := [name for name in plan.dynamic if name not in DYNAMIC]:
        raise UsageError(f"dynamic: expected some of {', '.join(DYNAMIC)}, got {unknown[0]!r}")
    if plan.mode != "add" and plan.alphas is None:
        raise UsageError(
            f"alpha: expected numbers for the mode {plan.mode}, as auto looks for a strength to add, got auto"
        )
    if plan.mode != "add" and plan.dynamic:
        raise UsageError(
            f"dynamic: expected none for the mode {plan.mode}, as they change a strength to add, got {plan.dynamic[0]}"
        )
    if plan.unit != "absolute" and "set_point" in plan.dynamic:
        raise UsageError("dynamic: expected set_point with the unit absolute alone, in which activations are, got it with "
                         f"{plan.unit}")  # fmt: skip


@dataclass(frozen=True)
class _Arm:
    """A way to edit: `edits(alpha)`, whose sum a steering multiplies by its scale, and what alpha it starts from."""

    name: str
    edits: Callable[[float], list[Edit]]


def _arms(subject: Subject, plan: Plan) -> tuple[_Arm, _Arm | None]:
    """The features, and a random direction that is as long; None where edits are no additions."""

    def edits(alpha: float) -> list[Edit]:
        made = []
        for one in plan.chosen:
            maximum = subject.maxima.get(one.feature)
            if plan.unit == "max" and maximum is None:
                raise UsageError(
                    f"unit: expected features of which an activation was seen, {one.feature} never fired; take absolute"
                )
            made.append(Edit(one.feature, plan.mode, alpha, plan.unit, maximum))
        return made

    names = ", ".join(str(one.feature) for one in plan.chosen)
    feature = _Arm(f"feature {names}" if len(plan.chosen) == 1 else f"features {names}", edits)
    if plan.mode != "add":
        return feature, None
    direction = _random_direction(subject, plan)
    unit: Unit = "norm" if plan.unit == "norm" else "absolute"
    factor = float(direction.norm()) if unit == "norm" else 1.0  # a norm's unit leaves the direction's own length out
    return feature, _Arm(_RANDOM, lambda alpha: [Edit(direction=direction, amount=alpha * factor, unit=unit)])


def _random_direction(subject: Subject, plan: Plan) -> Tensor:
    """A direction as long as what the features add together for alpha = 1."""
    ids = [one.feature for one in plan.chosen]
    rows = subject.sae.feature_weights(ids).W_dec.detach().float().cpu()
    if plan.unit == "norm":
        rows = torch.nn.functional.normalize(rows, dim=1)
    elif plan.unit == "max":
        rows = rows * torch.tensor([subject.maxima.get(feature, 0.0) for feature in ids])[:, None]
    drawn = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(plan.seed))
    return drawn / drawn.norm() * rows.sum(0).norm()


class _Bench:
    """Lets the model write, and measures what it wrote."""

    def __init__(self, subject: Subject, plan: Plan, streamed: Callable[[str], Any] | None) -> None:
        self.subject, self.plan = subject, plan
        self.model = subject.residual.model
        self.prompts = [self._rendered(prompt) for prompt in plan.prompts]
        self.advance: Callable[[int], object] = lambda n: None
        self._streamed = streamed
        self._length: dict[str, Any] = {"max_new_tokens": plan.max_new_tokens}
        self._draws: dict[str, Any] = {"temperature": plan.temperature, "seed": plan.seed}

    def _rendered(self, text: str) -> list[int]:
        return render(self.subject.tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)

    def unsteered(self) -> Run:
        """The texts of the model as it is."""
        with self._told("unsteered") as on_token:
            found = self._written(None, None, on_token)
        return self._run("unsteered", "fixed", 0.0, found)

    def prompted(self, instruction: str) -> Run:
        """The texts of the model that is asked in words, measured beside the prompt without these words."""
        asked = [self._rendered(f"{prompt}\n\n{instruction}") for prompt in self.plan.prompts]
        with self._told(f"prompted: {instruction}") as on_token:
            found = roll_out(
                self.model, self.subject.tokenizer, asked, None, **self._length, **self._draws, on_token=on_token
            )
        return self._run("prompted", "fixed", 0.0, prompted_rollouts(self.model, asked, self.prompts, found))

    def fixed(self, arm: _Arm, alpha: float) -> Run:
        """The texts with the same edit at every token."""
        with self._steering(arm, alpha) as steering, self._told(f"{arm.name}, alpha {alpha:g}") as on_token:
            return self._run(arm.name, "fixed", alpha, self._written(steering, Fixed(1.0), on_token))

    def calibrated(self, arm: _Arm) -> Calibration:
        """The strength at which the KL is 1 nat at the 95th percentile."""
        with self._steering(arm, 1.0) as steering:
            return calibrate(
                self.model,
                self.subject.tokenizer,
                self.prompts,
                steering,
                max_new_tokens=min(32, self.plan.max_new_tokens),
            )

    def matched(self, arm: _Arm, reference: Run) -> list[Run]:
        """The dynamic doses, each brought to the mean KL of a fixed one; one that cannot get there is left out, and told."""
        target, runs = reference["mean_kl"] or 0.0, []
        with self._steering(arm, 1.0) as steering:
            for name in self.plan.dynamic:
                guess, controller_at = self._controller(name, reference)
                known: dict[float, list[Rollout]] = {}

                def mean_kl(
                    dose: float,
                    at: Callable[[float], Controller] = controller_at,
                    known: dict[float, list[Rollout]] = known,
                ) -> float | None:
                    known[dose] = self._written(steering, at(dose), None)
                    return measure_all(known[dose], self.plan.prompts)["mean_kl"]

                dose = match(mean_kl, target=target, guess=guess)
                if dose is None:
                    logger.warning("%s is left out: no dose was found whose mean KL is the %.3g nats of alpha %g", name, target,
                                   reference["alpha"])  # fmt: skip
                    continue
                with self._told(f"{arm.name}, {name}") as on_token:
                    texts = self._written(steering, controller_at(dose), on_token) if on_token else known[dose]
                runs.append(self._run(arm.name, name, dose, texts))
        return runs

    def _controller(self, name: str, reference: Run) -> tuple[float, Callable[[float], Controller]]:
        """The first guess of a dynamic dose, and what the number of a dose means."""
        alpha, mean_kl = reference["alpha"], reference["mean_kl"] or 0.0
        if name == "decay":
            return 1.5 * alpha, lambda strength: Decay(self.plan.max_new_tokens / 2, strength)
        if name == "kl_cap":
            return 2 * mean_kl, lambda budget: KLCap(budget, 8 * alpha)
        return alpha, lambda target: SetPoint(target, gain=0.5, integral=0.02)

    def _written(
        self, steering: Steering | None, controller: Controller | None, on_token: OnToken | None
    ) -> list[Rollout]:
        tokenizer, options = self.subject.tokenizer, {**self._length, **self._draws, "on_token": on_token}
        return roll_out(self.model, tokenizer, self.prompts, steering, controller, **options)

    @contextmanager
    def _steering(self, arm: _Arm, alpha: float) -> Iterator[Steering]:
        subject, place = self.subject, self.subject.residual.place
        options = {"tokenizer": subject.tokenizer, "layer": place.layer, "hook": place.hook}
        with steer(self.model, subject.sae, arm.edits(alpha), self.plan.positions, **options) as steering:
            yield steering

    @contextmanager
    def _told(self, title: str) -> Iterator[OnToken | None]:
        if self._streamed is None:
            yield None
        else:
            with self._streamed(title) as on_token:
                yield on_token
        self.advance(1)

    def _run(self, arm: str, dose: str, alpha: float, rollouts: list[Rollout]) -> Run:
        prompts = self.plan.prompts
        bounded = [replace(one, kl=_bounded(one.kl), surprise=_bounded(one.surprise)) for one in rollouts]
        texts: list[Text] = [
            {
                "prompt": i,
                "text": one.text,
                "pieces": one.pieces,
                "kl": one.kl,
                "strengths": one.strengths,
                "acts": one.acts,
                "ended": one.ended,
                **measure(one, prompts[i]),
            }
            for i, one in enumerate(bounded)
        ]
        return {"arm": arm, "dose": dose, "alpha": alpha, "texts": texts, **measure_all(bounded, prompts)}


def _bounded(nats: list[float]) -> list[float]:
    """A model that holds a token for impossible makes it infinitely surprising, which JSON has no number for."""
    return [min(value, _MOST_NATS) for value in nats]


def _stable(arm: str, runs: Sequence[Run]) -> Stable:
    found = stable_range([(run["alpha"], run) for run in runs if run["arm"] == arm], runs[0])
    return {"arm": arm, "dose": "fixed", **found._asdict(), "breaks": list(found.breaks)}  # type: ignore[typeddict-item]


def _reference(runs: Sequence[Run], arm: str, stable: Stable, auto: Calibration | None) -> Run | None:
    """The fixed dose beside which dynamic ones are set: that which was found, or the largest that holds, or the smallest."""
    pushed = [run for run in runs if run["arm"] == arm and run["alpha"] > 0 and run["mean_kl"]]
    if not pushed:
        return None
    if auto is not None:
        return min(pushed, key=lambda run: abs(run["alpha"] - auto.alpha))
    holding = [run for run in pushed if run["alpha"] <= (stable["highest"] or 0.0)]
    return max(holding, key=lambda run: run["alpha"]) if holding else min(pushed, key=lambda run: run["alpha"])


def _result(
    subject: Subject, plan: Plan, auto: Calibration | None, runs: list[Run], stable: list[Stable], seconds: float
) -> Result:
    place = subject.residual.place
    return {
        "model": subject.model_name,
        "sae": subject.name,
        "layer": place.layer,
        "hook": place.hook,
        "architecture": subject.sae.architecture,
        "positions": plan.positions,
        "mode": plan.mode,
        "unit": plan.unit,
        "max_new_tokens": plan.max_new_tokens,
        "temperature": plan.temperature,
        "seed": plan.seed,
        "features": [
            {
                "feature": one.feature,
                "chosen_by": one.chosen_by,
                "score": one.score,
                "maximum": subject.maxima.get(one.feature),
            }
            for one in plan.chosen
        ],
        "prompts": list(plan.prompts),
        "instruction": plan.instruction,
        "auto": None if auto is None else _auto(auto),
        "runs": runs,
        "stable": stable,
        "seconds": seconds,
        "versions": {"fastsae": __version__, "torch": torch.__version__},
    }


def _auto(found: Calibration) -> Auto:
    tried: list[Tried] = [{"alpha": alpha, "p95_kl": p95_kl} for alpha, p95_kl in found.tried]
    return {"alpha": found.alpha, "p95_kl": found.p95_kl, "tried": tried}
