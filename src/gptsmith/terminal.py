"""All output for people goes through this file, so that no text can control the terminal.

Prompts, model output, file names, labels and error messages may contain escape sequences, which can
retitle a window, hide lines or type answers. `visible` escapes such characters. Messages go through
`say` (standard output) and `note` (standard error), tables and progress through `gptsmith.console`.
`write` is for data: exact in files and pipes, escaped on a terminal.

Only the standard library is imported here: `gptsmith --help` must be instant.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Controls, formats (direction of writing, zero width, tags), surrogates, separators of lines.
_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Formats that words and emoji are written with (the zero-width joiners), and Arabic, Syriac and
# Kaithi signs, which are visible although they are formats.
_WRITING = frozenset(
    "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"
    "\U000110bd\U000110cd"
)


def visible(text: str, keep: str = "\n\t") -> str:
    r"""The text with every control character escaped, such as \x1b, \x9b, \r or \u202e.

    keep: control characters that stay; with "", any text becomes one line. Idempotent.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_control(c) else escaped(c) for c in text)


def _is_control(c: str) -> bool:
    return not c.isprintable() and unicodedata.category(c) in _CATEGORIES and c not in _WRITING


def escaped(c: str) -> str:
    r"""A character as a Python escape sequence: \n, \x1b, \u202e, \udcff."""
    return c.encode("unicode_escape").decode("ascii")


def counted(count: int, noun: str) -> str:
    """A number and its noun: `1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say(text: str = "") -> None:
    """Print a message on standard output."""
    _print(sys.stdout, f"{visible(text)}\n")


def note(text: str) -> None:
    """Print a message on standard error: notices, progress, errors."""
    _print(sys.stderr, f"{visible(text)}\n")


def write(text: str, end: str = "\n", flush: bool = False) -> None:
    """Print data on standard output: exact in a file or pipe, `visible` on a terminal.

    ValueError for a character that the encoding of a file or pipe does not have.
    """
    out = sys.stdout
    if out.isatty():
        _print(out, visible(text) + end)
        return
    try:
        with _named(out):
            out.write(text + end)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"standard output is {out.encoding}, which has no {error.object[error.start]!r}: "
            "set PYTHONIOENCODING=utf-8"
        ) from None
    if flush:
        flush_output()


def flush_output() -> None:
    """Flush standard output; OSError if it cannot be written (a full disk)."""
    with _named(sys.stdout):
        sys.stdout.flush()


def discard_output() -> None:
    """Drop what is still buffered for standard output, and all that follows, without an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def silenced() -> Iterator[None]:
    """Discard everything that is printed inside, also by libraries."""
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams


def last_words(text: str) -> None:
    """Print a message on the process's own standard error, even where output is silenced: for a
    process that ends with os._exit."""
    if sys.__stderr__ is not None:
        _print(sys.__stderr__, f"{visible(text)}\n")


def encodable(text: str, encoding: str | None) -> str:
    """The text with characters that the encoding lacks escaped."""
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def _print(stream: TextIO, text: str) -> None:
    with _named(stream):
        stream.write(encodable(text, stream.encoding))
        stream.flush()  # in order with what libraries and other processes write


@contextmanager
def _named(stream: TextIO) -> Iterator[None]:
    """Errors of the stream name it."""
    try:
        yield
    except OSError as error:
        error.filename = "standard error" if stream is sys.stderr else "standard output"
        raise


def show_library_messages() -> None:
    """Escape what libraries warn about and log, since it may quote names and data."""
    import logging
    import warnings

    def show(*warning: Any, **_: Any) -> None:  # message, category, file name, line ...
        note(warnings.formatwarning(*warning[:4]).rstrip("\n"))

    class Record(logging.LogRecord):
        def getMessage(self) -> str:  # noqa: N802 - the name in logging
            return visible(super().getMessage())

    warnings.showwarning = show
    logging.setLogRecordFactory(Record)
