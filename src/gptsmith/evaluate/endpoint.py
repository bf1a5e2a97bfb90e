"""Chat completions over HTTP, by OpenAI's protocol, which most servers support, or Ollama's own.

Only Ollama's own protocol sets num_ctx; through OpenAI's, Ollama silently truncates prompts that
are longer than its default context.
References: platform.openai.com/docs/api-reference/chat and docs/api.md in ollama/ollama.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx

from gptsmith.evaluate.options import JudgeOptions

SEED = 0
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled for each further one ...
MAX_WAIT = 60.0  # ... up to this, even if the server asks for more

_RETRY = (408, 425, 429)  # and 5xx
_MIN_SECRET_LENGTH = (
    8  # length from which on a key is masked in texts; "none" or "EMPTY" are not secrets
)


class EndpointError(Exception):
    """There is no answer; the message says why, in one line."""


class Endpoint:
    """A chat model behind a URL; thread-safe. ValueError without a model, or without its key."""

    def __init__(self, options: JudgeOptions) -> None:
        if not options.model:
            raise ValueError("no judge: name a model that the endpoint serves, --judge.model")
        self.options = options
        self.address, self.protocol = resolve(str(options.url), options.protocol)
        # Addresses without secrets: messages name the host, verdicts are stored under the place.
        self.host = f"{self.address.scheme}://{self.address.netloc.decode()}"
        self.place = f"{self.host}{self.address.path}"
        # What makes an answer as reproducible as the server can, in the protocol's terms.
        self.settings: dict[str, Any] = {"temperature": 0, "seed": SEED}
        if self.protocol == "ollama":  # OpenAI's limit of length has different names in servers
            limits = {"num_ctx": options.num_ctx, "num_predict": options.num_ctx // 2}
            self.settings = {"format": "json", "options": self.settings | limits}
        self._key = _key(options.key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=options.timeout, headers=headers)

    def close(self) -> None:
        self._client.close()

    def request(self, *messages: Mapping[str, str]) -> dict[str, Any]:
        """The body of a request."""
        body: dict[str, Any] = {"model": self.options.model, "messages": messages}
        return body | ({"stream": False} if self.protocol == "ollama" else {}) | self.settings

    def ask(self, request: Mapping[str, Any]) -> str:
        """The answer to a request, with the key masked if the server repeats it.

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
                response = self._client.post(self.address, json=request)
            except httpx.TimeoutException:
                problem = f"no answer within {self.options.timeout:g} s"
                continue
            except httpx.RequestError as error:
                why = self._one_line(str(error) or type(error).__name__)
                problem = f"{self.host} is not reachable ({why})"
                continue
            if (status := response.status_code) == 200:
                return self._answer(response)
            problem = f"HTTP {status}: {self._one_line(response.text or response.reason_phrase)}"
            if status not in _RETRY and status < 500:
                raise EndpointError(problem)
            after = response.headers.get("Retry-After", "")
            pause = float(after) if re.fullmatch("[0-9]{1,9}", after) else 0.0
        raise EndpointError(f"{problem} (attempts: {self.options.retries + 1})")

    def _answer(self, response: httpx.Response) -> str:
        try:
            reply = response.json()
            choice = reply if self.protocol == "ollama" else reply["choices"][0]
            message = choice["message"]
            content = message["content"]
            if content is None:
                content = message["refusal"]
            if isinstance(content, list):  # parts, of which some may be reasoning
                content = "".join(p["text"] for p in content if p["type"] == "text")
            # Lone surrogates, which JSON can spell, can be neither stored nor sent back.
            answer = content.encode(errors="replace").decode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = self._one_line(response.text)[:60]
            raise EndpointError(f"not a chat completion of {self.protocol}: {shown!r}") from None
        if self.protocol == "ollama":
            tokens = reply.get("prompt_eval_count", 0) + reply.get("eval_count", 0)
            if tokens >= self.options.num_ctx:  # the beginning of the prompt was cut off
                raise EndpointError(f"{tokens} tokens do not fit: raise --judge.num-ctx")
        return self._mask_key(answer)

    def _one_line(self, text: str) -> str:
        """A server's message, safe to print."""
        line = " ".join(self._mask_key(text).split())
        return "".join(c for c in line if c.isprintable())[:200]

    def _mask_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _MIN_SECRET_LENGTH else text


def resolve(url: str, protocol: str) -> tuple[httpx.URL, str]:
    """The URL for requests, and the protocol to use there."""
    parsed = httpx.URL(url)
    path = parsed.path.rstrip("/")
    if protocol == "auto":
        ollama = path.endswith(("/api", "/api/chat")) or (parsed.port == 11434 and not path)
        protocol = "ollama" if ollama else "openai"
    base, end = {"ollama": ("/api", "/chat"), "openai": ("/v1", "/chat/completions")}[protocol]
    if not path.endswith(end):
        path = (path or base) + end
    return parsed.copy_with(path=path), protocol


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
