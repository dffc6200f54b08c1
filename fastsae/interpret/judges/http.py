"""One request to an endpoint, and what its failure means: try again, or not."""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

_MOST_BYTES = 2**24  # an answer is a few kilobytes
_TRY_AGAIN = frozenset((408, 409, 425, 429))
_SHOWN = 300  # characters of what a server says


class UnansweredError(Exception):
    """The endpoint did not answer this time.

    Args:
        reason: What happened, for a message.
        wait: Seconds after which it asked to be tried again, None where it did not say.
        unreachable: Whether nothing answers at its address.
    """

    def __init__(self, reason: str, wait: float | None = None, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


class RefusedError(Exception):
    """The endpoint does not take this request, however often it is sent.

    Args:
        status: The HTTP status.
        text: What it said.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}" if text else f"HTTP {status}")
        self.status, self.text = status, text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the key would go to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def post(url: str, body: dict[str, Any], key: str | None, timeout: float) -> dict[str, Any]:
    """Sends JSON and returns the JSON object that comes back.

    Args:
        url: Where to.
        body: What is sent.
        key: Sent as a bearer token, and never shown.
        timeout: Seconds for the whole answer.

    Raises:
        UnansweredError: It may work another time.
        RefusedError: It will not.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            raw = _read(response, time.monotonic() + timeout)
    except urllib.error.HTTPError as error:
        raise _of_status(error, key) from None
    except (OSError, http.client.HTTPException) as error:
        raise _of_connection(error, timeout) from None
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        raise UnansweredError(f"it answered what is no JSON, {_short(raw, key)!r}") from None
    if not isinstance(answer, dict):
        raise UnansweredError(f"it answered JSON that is no object, {_short(raw, key)!r}")
    return answer


def _read(response: Any, deadline: float) -> bytes:
    parts = b""
    while chunk := response.read1(2**16):
        parts += chunk
        if time.monotonic() > deadline:  # the socket's own limit begins anew with each piece
            raise TimeoutError
        if len(parts) > _MOST_BYTES:
            raise http.client.HTTPException("its answer does not end")
    return parts


def _of_status(error: urllib.error.HTTPError, key: str | None) -> UnansweredError | RefusedError:
    try:
        text = _short(error.read(_MOST_BYTES), key)
    except (OSError, http.client.HTTPException):
        text = ""
    finally:
        error.close()
    if 300 <= error.code < 400:
        return RefusedError(error.code, "it wants to send us elsewhere, where the key must not go; give the final URL")
    if error.code in _TRY_AGAIN or error.code >= 500:
        return UnansweredError(f"HTTP {error.code}: {text}", _seconds(error.headers.get("Retry-After")))
    return RefusedError(error.code, text)


def _of_connection(error: Exception, timeout: float) -> UnansweredError:
    reason = getattr(error, "reason", error)  # urllib wraps what the socket says
    if isinstance(reason, TimeoutError):
        return UnansweredError(f"no answer within {timeout:g} s")
    if isinstance(reason, ssl.SSLError):
        return UnansweredError(f"no secure connection: {reason}", unreachable=True)
    dropped = isinstance(reason, ConnectionError) and not isinstance(reason, ConnectionRefusedError)
    no_server = isinstance(error, (urllib.error.URLError, http.client.InvalidURL)) and not dropped
    return UnansweredError(str(reason) or type(reason).__name__, unreachable=no_server)


def _seconds(retry_after: str | None) -> float | None:
    """The header's value, which is a number of seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds())


def _short(raw: bytes, key: str | None) -> str:
    text = " ".join(raw.decode("utf-8", "replace").split())
    if key:
        text = text.replace(key, "***")  # a server may repeat what it was sent
    return text[:_SHOWN]
