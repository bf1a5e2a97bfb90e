"""The Jinja environment of chat templates, as in transformers' utils/chat_template_utils.py.

Templates are untrusted. Jinja's sandbox keeps them out of the interpreter, but does not limit time
and memory, so a template that is not ours is rendered in a worker process (sandbox.py).
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

# A template's budget of processor time in seconds, and what each rendering adds to it.
_SECONDS, _REFILL = 1.0, 0.05
_MEMORY = 256 << 20
_SUBJECT = "the chat template"


class ChatTemplateText:
    """A chat template that renders conversations to text.

    is_ours: the template is part of this program; others are rendered in a worker process with
    limits on time and memory.
    """

    def __init__(self, source: str, is_ours: bool = False) -> None:
        self._source, self._is_ours = source, is_ours
        self._now = datetime.now().timestamp()  # fixed, so that all renderings agree
        self._seconds, self._failure = _SECONDS, ""

    def render(self, **variables: Any) -> str:
        """The rendered text. ValueError, in one line, for invalid Jinja, a conversation that the
        template rejects, and too much time or memory."""
        arguments = (self._source, self._now, variables)
        if self._is_ours:
            return render_template(*arguments)[0]
        if self._failure:
            raise ValueError(self._failure)
        try:
            text, seconds = sandbox.call(
                f"{__name__}:render_template", *arguments,
                what=_SUBJECT, seconds=self._seconds, memory=_MEMORY,
            )  # fmt: skip
        except sandbox.StoppedError as error:
            self._failure = str(error)  # later conversations fail at once
            raise
        self._seconds = min(_SECONDS, max(_REFILL, self._seconds - seconds + _REFILL))
        return text


def render_template(source: str, now: float, variables: dict[str, Any]) -> tuple[str, float]:
    """The rendered text and the seconds it took. now: the time that `strftime_now` formats.
    ValueError as from ChatTemplateText.render."""
    started = time.process_time()
    try:
        template = _compiled(source, now)
    except MemoryError:
        raise
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from None
    except Exception as error:  # RecursionError, or SyntaxError in the generated Python code
        raise ValueError(f"chat template: cannot be compiled ({_reason(error)})") from None
    try:
        text = template.render(**variables)
    except MemoryError:
        raise
    except Exception as error:  # TemplateError, or any error of the template's own code
        raise ValueError(f"{_SUBJECT} rejects this conversation: {_reason(error)}") from None
    if len(text) > 1_000_000 + 16 * len(str(variables)):
        raise ValueError(f"{_SUBJECT} makes {len(text):,} characters of this conversation")
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
    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.fromtimestamp(now).strftime
    return environment.from_string(source)
