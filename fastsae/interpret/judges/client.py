"""Asks an OpenAI-compatible endpoint many questions: side by side, patiently, within a budget, and none twice."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fastsae.data.progress import bar
from fastsae.errors import FastsaeError, UsageError, shown
from fastsae.interpret.judges.answer_cache import Answer, AnswerCache
from fastsae.interpret.judges.http import RefusedError, UnansweredError, post

_CHARACTERS_PER_TOKEN = 3  # English text has about four; a budget is better spent too early than overrun
_LONGEST_WAIT = 300.0  # seconds; a quota that fills up later ends the run
_NAMED_BY = {
    "response_format": ("response_format", "json_schema", "structured", "schema"),
    "max_tokens": ("max_tokens",),
    "temperature": ("temperature",),
}
"""Fields that an endpoint may not know, and by which words of its refusal that is told."""


class Question(NamedTuple):
    """What is asked.

    Attributes:
        prompt: The user's message.
        example: An answer of the wanted form, which a dry run returns.
        schema: JSON schema of the answer.
        max_tokens: How long the answer may be.
    """

    prompt: str
    example: dict[str, Any]
    schema: dict[str, Any]
    max_tokens: int


@dataclass(frozen=True)
class EndpointOptions:
    """How an endpoint is asked.

    Attributes:
        key_variable: Environment variable with the key.
        concurrency: Requests that run side by side.
        tries: How often a request is sent before the run ends, when nothing or an error of the server comes back.
        timeout: Seconds for one answer.
        budget: Tokens of prompts and answers together that may be spent. None has no limit.
        cache: Folder in which answers are kept. None keeps none.
        dry_run: Ask nothing, count calls and tokens.
    """

    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    tries: int = 6
    timeout: float = 120.0
    budget: int | None = None
    cache: Path | None = None
    dry_run: bool = False


class Client:
    """Asks one model of one endpoint.

    Args:
        model: The model's name, as the endpoint knows it.
        url: The endpoint's, to which `/chat/completions` is added.
        options: How it is asked.
        progress: Show a progress bar.
        pause: Waits so many seconds; tests do not.

    Raises:
        UsageError: The URL is none, or carries a password.
        FastsaeError: The environment has no key for it.
    """

    def __init__(
        self,
        model: str,
        url: str,
        options: EndpointOptions,
        *,
        progress: bool = False,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self.model, self.url, self._options = model, _completions_url(url), options
        self._key = None if options.dry_run else _key(self.url, options.key_variable)
        self._cache = AnswerCache(options.cache)
        self._progress = progress
        self._stopped = threading.Event()
        self._pause = pause or self._stopped.wait
        self._lock = threading.Lock()
        self._refused: set[str] = set()
        self._has_answered = False
        self._last_refusal: str | None = None
        self._reserved = 0
        self.counts = {"calls": 0, "cached": 0, "tokens": 0, "unanswered": 0}

    def ask(self, questions: Sequence[Question], what: str) -> list[str | None]:
        """The answer to each question, None where the endpoint gave none.

        Args:
            questions: What is asked.
            what: What the progress bar says.

        Raises:
            FastsaeError: The endpoint cannot be reached, refuses, fails too often, or the budget is spent.
        """
        self._stopped.clear()
        pool = ThreadPoolExecutor(max(1, self._options.concurrency))
        futures: list[Future[str | None]] = [pool.submit(self._answer, question) for question in questions]
        try:
            with bar(what, "answer", total=len(questions), progress=self._progress) as advance:
                for future in as_completed(futures):
                    future.result()
                    advance(1)
        except BaseException as error:
            self._stopped.set()
            pool.shutdown(wait=isinstance(error, FastsaeError), cancel_futures=True)  # what is under way is kept
            raise
        pool.shutdown()
        answers = [future.result() for future in futures]
        if self._last_refusal and all(answer is None for answer in answers):
            raise FastsaeError(f"the endpoint {self.url} refuses every request, the last one with {self._last_refusal}")
        return answers

    def facts(self) -> dict[str, Any]:
        """What was asked of whom, ready for JSON."""
        return {"model": self.model, "url": self.url, "without": sorted(self._refused), **self.counts}

    def _answer(self, question: Question) -> str | None:
        body = self._body(question)
        kept = self._cache.get(self.url, body)
        if kept is not None:
            self._count(cached=1)
            return kept.text
        estimate = len(question.prompt) // _CHARACTERS_PER_TOKEN + question.max_tokens
        if self._options.dry_run:
            self._count(calls=1, tokens=estimate)
            return json.dumps(question.example)
        self._reserve(estimate)
        try:
            answer = self._patiently(body, estimate)
        finally:
            with self._lock:
                self._reserved -= estimate
        self._count(tokens=answer.tokens)
        if answer.text is not None:
            self._cache.put(self.url, body, answer)
        return answer.text

    def _body(self, question: Question) -> dict[str, Any]:
        form = {"name": "answer", "strict": True, "schema": question.schema}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "temperature": 0,
            "max_tokens": question.max_tokens,
            "response_format": {"type": "json_schema", "json_schema": form},
        }

    def _patiently(self, body: dict[str, Any], estimate: int) -> Answer:
        """Sends a request until it is answered, or refused for what it asks."""
        failures = 0
        while True:
            if self._stopped.is_set():
                raise FastsaeError("stopped, as another request has failed")
            sent = self._without_refused(body)
            self._count(calls=1)
            try:
                answer = _read(post(self.url, sent, self._key, self._options.timeout), estimate)
            except RefusedError as refused:
                if not self._leaves_out(sent, refused):
                    return self._none(refused)
            except UnansweredError as unanswered:
                failures += 1
                self._count(unanswered=1)
                self._pause(self._wait(unanswered, failures))
            else:
                self._has_answered = True
                return answer

    def _without_refused(self, body: dict[str, Any]) -> dict[str, Any]:
        refused = self._refused.copy()
        sent = {name: value for name, value in body.items() if name not in refused}
        if "max_tokens" in refused:
            sent["max_completion_tokens"] = body["max_tokens"]  # its name in newer models of OpenAI
        return sent

    def _leaves_out(self, sent: dict[str, Any], refused: RefusedError) -> bool:
        """Whether the endpoint named a field that it can do without; the field is then sent no more."""
        text = refused.text.lower()
        for name, words in _NAMED_BY.items():
            if refused.status in (400, 422) and name in sent and any(word in text for word in words):
                self._refused.add(name)
                return True
        return False

    def _none(self, refused: RefusedError) -> Answer:
        """No answer to a request that is refused for what it asks, such as for the words in it; an error for other refusals."""
        if refused.status in (401, 403):
            raise FastsaeError(
                f"the endpoint {self.url} does not take the key in {self._options.key_variable} ({refused}). Set the "
                "variable to a key of this endpoint, or name another variable"
            )
        if refused.status in (402, 404) or refused.status < 400:
            raise FastsaeError(
                f"the endpoint {self.url} does not answer for the model {self.model!r} ({refused}). Check the URL, the "
                "model's name and the account"
            )
        self._last_refusal = str(refused)
        return Answer(None, 0)

    def _wait(self, unanswered: UnansweredError, failures: int) -> float:
        """Seconds until the next try."""
        if unanswered.unreachable and not self._has_answered:
            raise FastsaeError(
                f"the endpoint {self.url} cannot be reached: {unanswered}. Check the URL, and that its server runs; the "
                "judge 'embedding' needs none"
            )
        wait = unanswered.wait
        if wait is None:
            wait = min(60.0, 2.0 ** (failures - 1)) * random.uniform(0.5, 1)  # not all at the same time
        if failures >= self._options.tries or wait > _LONGEST_WAIT:
            asked = f", and asks to wait {wait:.0f} s" if wait > _LONGEST_WAIT else ""
            raise FastsaeError(
                f"the endpoint {self.url} failed {failures} times in a row, the last time with: {unanswered}{asked}. "
                f"{self._kept()}"
            )
        return wait

    def _reserve(self, estimate: int) -> None:
        """Takes what a request may cost from the budget, until it is known what it did cost."""
        with self._lock:
            spent = self.counts["tokens"] + self._reserved
            if self._options.budget is not None and spent + estimate > self._options.budget:
                raise FastsaeError(
                    f"the budget of {self._options.budget:,} tokens is spent: {spent:,} are gone or under way, and the next "
                    f"request may take {estimate:,}. {self._kept()}"
                )
            self._reserved += estimate

    def _kept(self) -> str:
        if self._options.cache is None:
            return "Answers are not kept, as no cache was given"
        return f"The answers so far are kept in {self._options.cache}; the same command goes on from there"

    def _count(self, **numbers: int) -> None:
        with self._lock:
            for name, number in numbers.items():
                self.counts[name] += number


def _read(reply: dict[str, Any], estimate: int) -> Answer:
    """What a reply says, and how many tokens it took."""
    choices = reply.get("choices")
    if not isinstance(choices, list):
        raise UnansweredError(f"its answer has no choices but {', '.join(map(repr, list(reply)[:5])) or 'nothing'}")
    usage = reply.get("usage")
    counted = usage.get("total_tokens") if isinstance(usage, dict) else None
    tokens = counted if isinstance(counted, int) else estimate
    try:
        content = choices[0]["message"]["content"]
    except (IndexError, KeyError, TypeError):
        content = None
    if isinstance(content, list):  # a list of parts, some of which are text
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return Answer(content if isinstance(content, str) else None, tokens)


def _completions_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise UsageError(f"judge: expected a URL such as https://api.openai.com/v1, got {shown(url)}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError("judge: expected a URL without password, query or fragment; a key belongs in the environment")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def _key(url: str, variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise FastsaeError(f"the key in {variable} holds characters that no key has: set it again")
    host = urlsplit(url).hostname or ""
    if key or host == "localhost" or host == "::1" or host.startswith("127."):
        return key or None
    raise FastsaeError(
        f"the endpoint {url} needs a key, and the environment variable {variable} is not set: set it, or name another "
        "variable. For an endpoint that takes none, set it to any word"
    )
