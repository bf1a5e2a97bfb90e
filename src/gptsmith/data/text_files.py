"""Plain text files in bounded memory: one document, or several with a separator between them."""

import re
from collections.abc import Iterator
from pathlib import Path

from gptsmith.data.documents import Document, document
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport

SUFFIXES = (".txt", ".md")

CHUNK_BYTES = 1 << 18  # read at a time


def text_documents(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """The file as one document, or several between separators."""
    separator = options.document_separator
    return _separated(path, separator, report) if separator else _whole(path, report)


# A boundary between two pre-tokens of GPT-2 in any context: white space begins (Python's \S is a
# subset of "not White_Space"), or an ASCII letter is followed by ASCII that is not a letter.
_BOUNDARY = re.compile(r"\S(?=[ \t\r\n])|[A-Za-z](?=[!-@\[-`{-~])")


def safe_cut(text: str) -> int:
    """The last index where `text` may be cut without a change of ids; 0 if there is none.

    Valid for GPT-2's split pattern (no pre-token spans such a boundary, and none depends on what
    comes before it) and trivially for characters and bytes. Other tokenizers get whole documents.
    """
    window = 256
    while True:
        start = max(0, len(text) - window)
        ends = [match.end() for match in _BOUNDARY.finditer(text, start)]
        if ends or not start:
            return ends[-1] if ends else 0
        window *= 16


class TextFile:
    """The chunks of a text file, read again at each iteration."""

    def __init__(self, path: Path, report: ReadReport) -> None:
        self.path, self.report = path, report

    def __iter__(self) -> Iterator[str]:
        parts: list[str] = []  # text after the last safe cut
        for text in _decoded(self.path, self.report):
            cut = safe_cut(text)
            if cut:
                yield "".join([*parts, text[:cut]])
                parts.clear()
            parts.append(text[cut:])
        if rest := "".join(parts):
            yield rest


def text_lines(path: Path, report: ReadReport) -> Iterator[str]:
    """The file's lines with their line ends."""
    rest = ""
    for text in _decoded(path, report):
        *lines, rest = (rest + text).split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


def _whole(path: Path, report: ReadReport) -> Iterator[Document]:
    chunks = TextFile(path, report)
    for chunk in chunks:
        if chunk.strip():
            if "<|endoftext|>" in chunk:
                report.hint(
                    f"{path}: holds <|endoftext|> as plain text; if it separates documents, "
                    "use --document-separator '<|endoftext|>'"
                )
            yield Document(str(path), chunks)
            return
    report.reject("empty document", str(path), "nothing but white space")


def _separated(path: Path, separator: str, report: ReadReport) -> Iterator[Document]:
    pending, number = "", 0
    for text in _decoded(path, report):
        searched = max(0, len(pending) - len(separator) + 1)
        pending += text
        if pending.find(separator, searched) >= 0:
            *whole, pending = pending.split(separator)
            for one in whole:
                if one := one.strip("\r\n"):
                    number += 1
                    yield from document(f"{path}, document {number}", one, report)
    if pending := pending.strip("\r\n"):
        yield from document(f"{path}, document {number + 1}", pending, report)


def _decoded(path: Path, report: ReadReport) -> Iterator[str]:
    """The file's text, line ends unchanged, in blocks that end after a line where possible."""
    with path.open("rb") as file:
        pending, offset, line = file.read(3).removeprefix(b"\xef\xbb\xbf"), 0, 1
        offset = file.tell() - len(pending)
        while block := file.read(CHUNK_BYTES):
            pending += block
            end = pending.rfind(b"\n") + 1
            # a line longer than a block is cut, unless it may have to be skipped as a whole
            if not end and not report.skips:
                end = _last_character(pending)
            yield _decode(pending[:end], path, offset, line, report)
            offset, line = offset + end, line + pending.count(b"\n", 0, end)
            pending = pending[end:]
            report.reached(path, offset)
        yield _decode(pending, path, offset, line, report)


def _last_character(data: bytes) -> int:
    """Where the last UTF-8 character begins, which may be incomplete."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def _decode(data: bytes, path: Path, offset: int, line: int, report: ReadReport) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if not report.skips:
            line += data.count(b"\n", 0, error.start)
            place = f"{path}, line {line}, byte {offset + error.start}"
            raise ValueError(
                f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8, "
                "or skip such lines with --on-error skip"
            ) from None
    good = []
    for number, one in enumerate(data.splitlines(keepends=True), line):
        try:
            good.append(one.decode())
        except UnicodeDecodeError:
            report.reject("line that is not UTF-8", f"{path}:{number}", "")
    return "".join(good)
