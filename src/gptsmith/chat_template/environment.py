"""Jinja as chat templates see it, after transformers' utils/chat_template_utils.py.

A template may come from anyone. Jinja's sandbox keeps it from the interpreter, but not from taking
all time and memory: a template that is not ours is rendered in a worker process (sandbox.py).
"""

import json
import time
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptsmith import sandbox

# Seconds of processor time that a template has for its first renderings, and gets back with each.
_SECONDS, _REFILL = 1.0, 0.05
_MEMORY = 256 << 20
_WHAT = "the chat template"


class ChatTemplateText:
    """The text of a conversation by a template.

    is_ours: the template is part of this program; others are rendered in a worker process, with
    little time and memory.
    """

    def __init__(self, source: str, is_ours: bool = False) -> None:
        self._source, self._is_ours = source, is_ours
        self._now = datetime.now().timestamp()  # the same for all renderings: they cannot differ
        self._seconds, self._refusal = _SECONDS, ""

    def render(self, **variables: Any) -> str:
        """ValueError, in one line, for invalid Jinja, for what the template refuses, and for what
        takes too much time or memory."""
        arguments = (self._source, self._now, variables)
        if self._is_ours:
            return rendered(*arguments)[0]
        if self._refusal:
            raise ValueError(self._refusal)
        try:
            text, seconds = sandbox.call(
                f"{__name__}:rendered", *arguments,
                what=_WHAT, seconds=self._seconds, memory=_MEMORY,
            )  # fmt: skip
        except sandbox.StoppedError as error:
            self._refusal = str(error)  # it is not tried again with each conversation
            raise
        self._seconds = min(_SECONDS, max(_REFILL, self._seconds - seconds + _REFILL))
        return text


def rendered(source: str, now: float, variables: dict[str, Any]) -> tuple[str, float]:
    """The text and the seconds that it took. now: the time of `strftime_now`. ValueError as from
    ChatTemplateText."""
    started = time.process_time()
    try:
        template = _compiled(source, now)
    except MemoryError:
        raise
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from None
    except Exception as error:  # RecursionError, or SyntaxError of the Python that Jinja makes
        raise ValueError(f"chat template: cannot be compiled ({_reason(error)})") from None
    try:
        text = template.render(**variables)
    except MemoryError:
        raise
    except Exception as error:  # TemplateError, or any error of the template's own code
        raise ValueError(f"{_WHAT} refuses this conversation: {_reason(error)}") from None
    if len(text) > 1_000_000 + 16 * len(str(variables)):
        raise ValueError(f"{_WHAT} makes {len(text):,} characters of this conversation")
    return text, time.process_time() - started


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks answers in transformers, ignored here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(source: str, now: float) -> Template:
    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = datetime.fromtimestamp(now).strftime
    return environment.from_string(source)
