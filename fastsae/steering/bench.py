"""Texts of a language model under one arm and one dose at a time, measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsae.data.progress import bar
from fastsae.data.tokens import render
from fastsae.errors import UsageError
from fastsae.steering.calibration import Calibration, calibrate, match
from fastsae.steering.doses import Controller, Decay, Fixed, KLCap, SetPoint
from fastsae.steering.edits import Edit, Unit
from fastsae.steering.measures import measure, measure_all
from fastsae.steering.options import Plan, Subject
from fastsae.steering.prompted import prompted_rollouts
from fastsae.steering.result import Run, Text
from fastsae.steering.rollout import Rollout, roll_out
from fastsae.steering.steering import Steering, steer
from fastsae.steering.twins import NotFiniteError

OnToken = Callable[[int, str], None]
_RANDOM = "random direction"
_MOST_NATS = 100.0
_CALIBRATED = 32  # tokens of the texts on which alpha is looked for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """A way to edit: `edits(alpha)`, whose sum a steering multiplies by its scale, and what alpha it starts from."""

    name: str
    edits: Callable[[float], list[Edit]]


def arms_of(subject: Subject, plan: Plan) -> tuple[Arm, Arm | None]:
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
    feature = Arm(f"feature {names}" if len(plan.chosen) == 1 else f"features {names}", edits)
    if plan.mode != "add":
        return feature, None
    direction = _random_direction(subject, plan)
    unit: Unit = "norm" if plan.unit == "norm" else "absolute"
    factor = float(direction.norm()) if unit == "norm" else 1.0  # a norm's unit leaves the direction's own length out
    return feature, Arm(_RANDOM, lambda alpha: [Edit(direction=direction, amount=alpha * factor, unit=unit)])


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


class Bench:
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

    def fixed(self, arm: Arm, alpha: float) -> Run | None:
        """The texts with the same edit at every token; None, and a warning, where it is too strong for the model's numbers."""
        try:
            with self._steering(arm, alpha) as steering, self._told(f"{arm.name}, alpha {alpha:g}") as on_token:
                return self._run(arm.name, "fixed", alpha, self._written(steering, Fixed(1.0), on_token))
        except NotFiniteError as error:
            logger.warning("%s, alpha %g is left out: %s", arm.name, alpha, error)
            return None

    def calibrated(self, arm: Arm, *, progress: bool) -> Calibration:
        """The strength at which the KL is 1 nat at the 95th percentile."""
        options: dict[str, Any] = {"max_new_tokens": min(_CALIBRATED, self.plan.max_new_tokens)}
        with (
            self._steering(arm, 1.0) as steering,
            bar("looking for alpha", "strength", total=None, progress=progress) as advance,
        ):
            found = calibrate(
                self.model, self.subject.tokenizer, self.prompts, steering, **options, tried=lambda: advance(1)
            )
        if not found.is_close:
            logger.warning("no alpha was found whose p95 KL is 1 nat: it jumps over that above %g, where it is %.3g",
                           found.alpha, found.p95_kl)  # fmt: skip
        return found

    def matched(self, arm: Arm, reference: Run) -> list[Run]:
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
    def _steering(self, arm: Arm, alpha: float) -> Iterator[Steering]:
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
    """Values of at most 100 nats: a token that a model holds for impossible has infinitely many, which JSON cannot hold."""
    return [min(value, _MOST_NATS) for value in nats]
