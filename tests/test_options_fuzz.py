"""Any value of any option gives a run, or one message that names the option: never a traceback.

The number of inputs is small here; `pytest -m slow tests/test_options_fuzz.py` tries a hundred times as many.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsae import FusedJumpReLUSAE, cli
from fastsae.errors import UsageError
from fastsae.flags import OPTIONS, as_flag, flag, given_options
from fastsae.train.config import TrainConfig
from fastsae.train.validate import option_kinds

KINDS = option_kinds(TrainConfig)
ODD_TEXTS = [
    *"0 -1 -0 1 2 0.5 1e12 1e15 1e18 1e30 1e300 -1e300 1e999 -1e999 1e-320 nan -nan inf -inf Infinity none None null".split(),
    *"true 1_000 1__0 0x10 1.5e6 12345678901234567890 9223372036854775807 9223372036854775808 -9223372036854775809".split(),
    *"-- - = * % %s {} $HOME ~ ~nouser ~nouser/x . .. /dev/null a/b/c a:b : cuda:99 cuda:-1 meta mps cpu:0 CPU".split(),
    *["", " ", "1 ", "\n", "a\nb", "\0", "\ud800", "\udcff", "é", "\u0663", "\uff11", "½", "1,5", "cuda:\u0663"],
    *["1" * 400, "1" * 5000, "x" * 5000, "a/" * 3000, "1e" + "9" * 400],
]
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
TINY = "--eval-dialogues 4 --d-sae 32 --tokens 256 --batch-size 64 --buffer-tokens 256 --forward-tokens 256 --quiet".split()
LONGEST_RUN = 2000  # tokens; what asks for more is right, and would take too long here
EVALUATED = (
    "model model_kwargs dataset split layer hook model_dtype max_length max_dialogues dedup_words eval_dialogues "
    "max_norm_multiple forward_tokens device seed"
)


def sizes(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(n: int, strategy: Any, check: Callable[[Any], None]) -> None:
    """Calls `check` with so many inputs, the same in every run."""
    options: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}
    settings(max_examples=n, suppress_health_check=list(HealthCheck), **options)(given(strategy)(check))()


def run(*arguments: object) -> tuple[int, str]:
    """Exit status of the command line and what it wrote to stderr; any exception that it lets through fails the test."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as stderr:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, stderr.getvalue()


def in_range(name: str) -> st.SearchStrategy[str]:
    """Values that an option takes, the smallest and the largest of them often."""
    kind, bounds = KINDS[name], OPTIONS[name].metadata["bounds"]
    if kind.choices:
        return st.sampled_from(kind.choices)
    if bounds is None:
        return st.sampled_from(ODD_TEXTS)
    low, high = bounds
    digits = st.floats(math.log(max(low, 1e-12)), math.log(high)).map(lambda x: min(max(math.exp(x), low), high))
    return (st.sampled_from([low, high]) | digits).map(lambda x: str(int(x) if kind.of is int else x))


def arguments(names: list[str], odd: bool) -> st.SearchStrategy[dict[str, str]]:
    """Flags of a few options with their values."""

    def argument(name: str) -> st.SearchStrategy[tuple[str, str]]:
        if KINDS[name].of is bool:
            return st.sampled_from([flag(name), "--no-" + flag(name)[2:]]).map(lambda text: (name, text))
        values = TEXTS if odd else in_range(name) | st.sampled_from(ODD_TEXTS)
        return values.map(lambda value: (name, f"{flag(name)}={value}"))

    return st.lists(st.sampled_from(names).flatmap(argument), min_size=1, max_size=3).map(dict)


def is_short(given: dict[str, str]) -> bool:
    """Whether a run with these options ends within seconds."""
    try:
        tokens = float(given.get("tokens", "=0").partition("=")[2])
    except ValueError:
        return True
    return not LONGEST_RUN < tokens <= OPTIONS["tokens"].metadata["bounds"][1]


def check_outcome(given: dict[str, str], status: int, err: str) -> None:
    assert status in (0, 1, 2), err
    if status:
        assert len(err) < 5000
    if status == 2:
        last = err.strip().splitlines()[-1]
        assert any(flag(name) in last for name in given), f"{given}: {err}"


@sizes(300, 30_000)
def test_any_text_for_any_option_is_taken_or_refused(n: int) -> None:
    parser = cli.build_parser()

    def check(given: dict[str, str]) -> None:
        with redirect_stderr(io.StringIO()) as stderr:
            try:
                TrainConfig(**given_options(parser.parse_args(["train", *given.values()])))
            except SystemExit as stop:
                check_outcome(given, int(stop.code or 0), stderr.getvalue())
            except UsageError as error:
                check_outcome(given, 2, as_flag(str(error)))

    fuzz(n, arguments(list(OPTIONS), odd=True), check)


@sizes(12, 300)
@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "topk --k 4", "batchtopk --k 4"])
def test_any_values_train_or_are_refused(
    n: int, architecture: str, tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    names = [name for name in OPTIONS if name not in ("architecture", "k")]
    base = ["train", "--model", tiny_model, "--dataset", chats, *TINY, "--architecture", *architecture.split()]
    runs = iter(range(10**9))

    def check(given: dict[str, str]) -> None:
        if is_short(given):
            status, err = run(*base, "--output", tmp_path / str(next(runs)), *given.values())
            check_outcome(given, status, err)

    fuzz(n, arguments(names, odd=False), check)


@sizes(20, 600)
def test_any_values_evaluate_or_are_refused(n: int, tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    FusedJumpReLUSAE(16, 32).save(tmp_path / "sae")
    base = ["evaluate", tmp_path / "sae", "--quiet", "--model", tiny_model, "--dataset", chats, "--layer", 0]
    base += ["--eval-dialogues", 4]

    def check(given: dict[str, str]) -> None:
        check_outcome(given, *run(*base, *given.values()))

    fuzz(n, arguments(EVALUATED.split(), odd=False), check)


@sizes(30, 3000)
def test_any_path_is_taken_or_refused(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def check(text: str) -> None:
        status, err = run("evaluate", f"--json={text}", "sae")
        assert (status, "Traceback" in err) == (2, False)
        status, err = run("train", f"--output={text}", "--model=./none")
        assert (status, "Traceback" in err) == (2, False)
        status, err = run("evaluate", "--", text)
        assert (status, "Traceback" in err) == (2, False)

    fuzz(n, TEXTS, check)
    assert list(tmp_path.iterdir()) == []
