"""A chat model behind HTTP: OpenAI's chat completions as most servers speak them, or Ollama's.

References: platform.openai.com/docs/api-reference/chat and docs/api.md in ollama/ollama.
"""

from __future__ import annotations

import email.utils
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import httpx
from pydantic import Field

from gptsmith.config import Section

SEED = 0
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled for each further one ...
MOST_WAIT = 60.0  # ... up to this
PATIENCE = 300.0  # a server that asks for a longer pause than this is not waited for

_AGAIN = (408, 425, 429)  # and 5xx: what may go better the next time
_SECRET = 8  # characters from which on a key is cut out of texts; "none" or "EMPTY" is no secret


class JudgeOptions(Section):
    """The model that judges, and where it is asked."""

    url: str = "http://localhost:11434"
    """Of Ollama, or of anything that has OpenAI's chat completions (https://HOST/v1)."""
    model: str | None = None
    """Its name there."""
    protocol: Literal["auto", "openai", "ollama"] = "auto"
    """auto: Ollama's on port 11434 and where the URL ends in /api/chat, else OpenAI's."""
    key_variable: str | None = None
    """Name of the environment variable that holds the API key, if one is needed."""
    parallel: int = Field(4, ge=1, le=64)
    """Requests at the same time."""
    timeout: float = Field(120, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(5, ge=0, le=20)
    """Further attempts when the server is busy, fails or is not reached."""
    num_ctx: int = Field(8192, ge=512)
    """Ollama: tokens of context; what is longer is not judged."""


class EndpointError(Exception):
    """No answer could be had; the message says why, for people."""


class _BusyError(EndpointError):
    """The same request may succeed later, at the earliest in `pause` seconds."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


class Endpoint:
    """Where questions are sent. Use as a context; any number of threads may ask.

    ValueError for a URL that is none or holds a password, no model, and a key that is not there.
    """

    def __init__(self, options: JudgeOptions) -> None:
        if not options.model:
            raise ValueError("no model that judges: name one that the endpoint has, --judge.model")
        self.model, self.retries, self.num_ctx = options.model, options.retries, options.num_ctx
        self.address, self.protocol = resolve(options.url, options.protocol)
        self._key = _key(options.key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=options.timeout, headers=headers)
        self._timeout = options.timeout

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def settings(self) -> dict[str, Any]:
        """What makes an answer as repeatable as the server can, by the protocol's names."""
        if self.protocol == "openai":  # no limit of length: its name differs among servers
            return {"temperature": 0, "seed": SEED}
        limits = {"num_ctx": self.num_ctx, "num_predict": self.num_ctx // 2}
        return {"format": "json", "options": {"temperature": 0, "seed": SEED, **limits}}

    def body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The request for an answer."""
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        return body | ({"stream": False} if self.protocol == "ollama" else {}) | self.settings()

    def ask(self, body: Mapping[str, Any]) -> str:
        """The answer to `body`, without the key if the server repeats that. EndpointError when
        there is none after the last attempt, or at once where another could not help."""
        for attempt in range(self.retries + 1):
            try:
                return self._once(body)
            except _BusyError as error:
                if error.pause > PATIENCE:
                    raise EndpointError(f"{error}; it asks for {error.pause:,.0f} s") from None
                if attempt == self.retries:
                    times = "attempt" if attempt == 0 else "attempts"
                    raise EndpointError(f"{error} ({attempt + 1} {times})") from None
                # Jitter: threads that were refused together must not come back together.
                wait = min(MOST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
                time.sleep(max(wait, error.pause))
        raise AssertionError("the last attempt returns or raises")

    def _once(self, body: Mapping[str, Any]) -> str:
        try:
            reply = self._client.post(self.address, json=body)
        except httpx.TimeoutException:
            raise _BusyError(f"no answer within {self._timeout:g} s") from None
        except httpx.TransportError as error:
            why = self._clean(str(error) or type(error).__name__)
            raise _BusyError(f"{host(self.address)} is not reached ({why})") from None
        except httpx.HTTPError as error:  # what it sent cannot be read
            raise EndpointError(f"a broken answer ({self._clean(str(error))})") from None
        if reply.status_code != 200:
            why = f"HTTP {reply.status_code}: {self._clean(_complaint(reply))}"
            if reply.status_code in _AGAIN or reply.status_code >= 500:
                raise _BusyError(why, _pause(reply.headers.get("Retry-After", "")))
            raise EndpointError(why)
        try:
            content = reply.json()
            used = [content.get(name) for name in ("prompt_eval_count", "eval_count")]
            message = content if self.protocol == "ollama" else content["choices"][0]
            text = message["message"]["content"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text, used = None, []
        if not isinstance(text, str):
            shown = self._clean(reply.text)[:60]
            raise EndpointError(f"no chat completion of the {self.protocol} protocol: {shown!r}")
        if self.protocol == "ollama" and sum(n for n in used if isinstance(n, int)) >= self.num_ctx:
            # Ollama cuts what does not fit without a word, and it cuts at the beginning.
            raise EndpointError(f"more than {self.num_ctx} tokens: raise --judge.num-ctx")
        # Lone surrogates, which JSON can spell, could be neither kept nor sent back.
        return self._without_key(text.encode(errors="replace").decode())

    def _clean(self, text: str) -> str:
        """What a server says, on one line, for a terminal."""
        line = " ".join(self._without_key(text).split())
        return "".join(c for c in line if c.isprintable())[:200]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _SECRET else text


def resolve(url: str, protocol: Literal["auto", "openai", "ollama"]) -> tuple[str, str]:
    """The address that requests go to, and the protocol that is spoken there."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--judge.url: not a URL ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("--judge.url: expected http://HOST:PORT or https://HOST/v1")
    if parsed.userinfo:
        raise ValueError("--judge.url holds a password: name its variable, --judge.key-variable")
    path = parsed.path.rstrip("/")
    known: str = protocol
    if protocol == "auto":
        ollama = path.endswith(("/api", "/api/chat")) or (parsed.port == 11434 and not path)
        known = "ollama" if ollama else "openai"
    ends = {"ollama": ("/api", "/chat"), "openai": ("/v1", "/chat/completions")}[known]
    if not path.endswith(ends[1]):
        path += ends[1] if path else "".join(ends)
    return str(parsed.copy_with(path=path)), known


def host(address: str) -> str:
    """Scheme, host and port: what may be shown of an address, whose query may hold secrets."""
    parsed = httpx.URL(address)
    return f"{parsed.scheme}://{parsed.netloc.decode()}"


def _key(variable: str | None) -> str:
    """The API key. What was given as `variable` is not repeated: it may be the key itself."""
    if variable is None:
        return ""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ValueError("--judge.key-variable: give the name of a variable, never the key itself")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError("--judge.key-variable names an environment variable that is not set")
    if not re.fullmatch(r"[!-~]+", key):  # httpx would repeat it in its complaint
        raise ValueError("the API key has characters that no key has: look at its variable")
    return key


def _pause(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _complaint(reply: httpx.Response) -> str:
    try:
        error = reply.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return reply.text or reply.reason_phrase
