"""A server that is asked over HTTP: again while it is busy or fails, and with an API key, which no
message repeats."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx

from gptsmith.evaluate.options import JudgeOptions

FIRST_WAIT = 1.0  # seconds before the second attempt, doubled for each further one ...
MAX_WAIT = 60.0  # ... up to this, even if the server asks for more
RETRY = (408, 425, 429)  # and 5xx
_MIN_SECRET_LENGTH = 8  # a shorter key, such as "EMPTY", is no secret and is not masked


class EndpointError(Exception):
    """The server gives no answer that can be used; the message says why, in one line."""


class HttpEndpoint:
    """One URL of a server; thread-safe. ValueError without the key that `options` name.

    public_url: the address without secrets. options: key, timeout and retries.
    """

    def __init__(self, address: httpx.URL, options: JudgeOptions) -> None:
        self.address, self.options = address, options
        self.public_url = str(address.copy_with(userinfo=b"", query=None))
        self._key = _key(options.key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=options.timeout, headers=headers)

    def close(self) -> None:
        self._client.close()

    def post(self, body: Mapping[str, Any]) -> httpx.Response:
        """The reply to a request, with status 200.

        EndpointError after the last attempt, or at once where a retry cannot help.
        """
        pause = 0.0
        for attempt in range(self.options.retries + 1):
            if attempt:
                # Jitter, so that threads that were rejected together do not return together.
                wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                time.sleep(min(MAX_WAIT, max(wait, pause)))
            pause = 0.0
            try:
                response = self._client.post(self.address, json=body)
            except httpx.TimeoutException:
                problem = f"no answer within {self.options.timeout:g} s"
                continue
            except httpx.RequestError as error:
                why = self.one_line(str(error) or type(error).__name__)
                problem = (
                    f"{self.public_url} is not reachable ({why}): start its server, or correct the "
                    "URL"
                )
                continue
            if (status := response.status_code) == 200:
                return response
            problem = f"HTTP {status}: {self.one_line(response.text or response.reason_phrase)}"
            if status not in RETRY and status < 500:
                raise EndpointError(problem)
            after = response.headers.get("Retry-After", "")
            pause = float(after) if re.fullmatch("[0-9]{1,9}", after) else 0.0
        raise EndpointError(f"{problem} (attempts: {self.options.retries + 1})")

    def one_line(self, text: str) -> str:
        """A server's message, safe to print."""
        line = " ".join(self.mask_key(text).split())
        return "".join(c for c in line if c.isprintable())[:200]

    def mask_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _MIN_SECRET_LENGTH else text


def _key(variable: str | None) -> str:
    """The API key. No message repeats the option: it may be the key itself, given by mistake."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            "--judge.key-variable: no environment variable of this name contains an API key (give"
            " the name of a variable, never the key itself)"
        )
    return key
