"""What a judge is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fastsae.interpret.windows import Window


class Evidence(NamedTuple):
    """Windows that show a feature.

    Attributes:
        firing: Windows in which it fires.
        silent: Windows in which it is silent, for judges that need a scale; others do not read them.
        wants_name: Whether anybody reads the name that is given with a rating; a judge may leave it out where nobody does.
    """

    firing: tuple[Window, ...]
    silent: tuple[Window, ...]
    wants_name: bool = True


class Detection(NamedTuple):
    """Windows of which a judge is to tell in which ones a feature fires.

    Attributes:
        evidence: What the judge may learn the feature from.
        windows: The windows in question, with no activation in any.
    """

    evidence: Evidence
    windows: tuple[Window, ...]


class Rating(NamedTuple):
    """How clearly a feature stands for one thing.

    Attributes:
        score: 1 to 5, None where the answer could not be read.
        name: What it seems to stand for, None where the answer could not be read.
    """

    score: int | None
    name: str | None


class Judge(Protocol):
    """Tells what features stand for. A call takes many tasks, so that the judge can run them side by side.

    Attributes:
        name: As the user gave it, such as `embedding` or `hf:MODEL`.
    """

    name: str

    def rate(self, tasks: Sequence[Evidence]) -> list[Rating]:
        """Rates each set of firing windows by FAST's rubric, and names what they have in common."""
        ...

    def detect(self, tasks: Sequence[Detection]) -> list[list[float | None]]:
        """How likely the feature fires in each window, 0 to 1; None where the answer could not be read."""
        ...

    def find_intruder(self, tasks: Sequence[Sequence[Window]]) -> list[int | None]:
        """The index of the window that does not belong to the others; None where the answer could not be read."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a reader of its scores should know, ready for JSON."""
        ...
