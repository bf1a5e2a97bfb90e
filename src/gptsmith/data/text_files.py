"""Plain text files in bounded memory: one document, or several with a separator between them."""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path

from gptsmith.data.decode import (
    LINE_LIMIT,
    NOT_UTF8,
    UTF8,
    decoding,
    detect_encoding,
    open_bytes,
    open_text,
)
from gptsmith.data.documents import Document, document
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.row import unicode_problem

SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz")  # read in a folder even if it holds tables

CHUNK_BYTES = 1 << 18  # read at a time


def text_documents(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """The file as one document, or several between separators."""
    text = TextFile(path, report, detect_encoding(path, options.encoding, report))
    if options.document_separator:
        return _separated_documents(text, options.document_separator)
    return _one_document(text)


# A boundary between two pre-tokens of GPT-2 in any context: white space begins (Python's \S is a
# subset of "not White_Space"), or an ASCII letter is followed by ASCII that is not a letter.
_BOUNDARY = re.compile(r"\S(?=[ \t\r\n])|[A-Za-z](?=[!-@\[-`{-~])")


def safe_cut(text: str) -> int:
    """The last index at which cutting `text` does not change its ids; 0 if there is none.

    Valid for GPT-2's split pattern (no pre-token spans such a boundary or depends on what is before
    it) and trivially for characters and bytes. Other tokenizers get whole documents.
    """
    window = 256
    while True:
        start = max(0, len(text) - window)
        ends = [match.end() for match in _BOUNDARY.finditer(text, start)]
        if ends or not start:
            return ends[-1] if ends else 0
        window *= 16


class TextFile:
    """The chunks of a text file, which is read anew in each iteration."""

    def __init__(self, path: Path, report: ReadReport, encoding: str = UTF8) -> None:
        self.path, self.report, self.encoding = path, report, encoding

    def __iter__(self) -> Iterator[str]:
        parts: list[str] = []  # text after the last safe cut
        length = 0
        for text in self.blocks():
            cut = safe_cut(text)
            if cut:
                yield "".join([*parts, text[:cut]])
                parts.clear()
                length = 0
            parts.append(text[cut:])
            length += len(text) - cut
            if length > LINE_LIMIT:
                raise ValueError(
                    f"{self.path}: {LINE_LIMIT >> 20} MiB without a space or line end: no text"
                )
        if rest := "".join(parts):
            yield rest

    def blocks(self) -> Iterator[str]:
        """The text in blocks, with its line ends, without rejected lines."""
        path, report, line, last = self.path, self.report, 1, "\n"
        decoder = codecs.getincrementaldecoder(self.encoding)("surrogateescape")
        with open_bytes(path) as (raw, file), decoding(path):
            at_end = False
            while not at_end:
                data = file.read(CHUNK_BYTES)
                if report.skips:  # whole lines; otherwise, text without line ends is read in blocks
                    data += file.readline(LINE_LIMIT)
                at_end = not data
                block = decoder.decode(data, at_end)
                lines, last = block.count("\n"), block[-1:] or last
                if unicode_problem(block):
                    numbered = enumerate(io.StringIO(block, newline=""), line)
                    block = "".join(text for n, text in numbered if self._is_decoded(text, n))
                yield block
                line += lines
                report.reached(path, raw.tell())
        if report.skips:
            report.read[path] = line - (last == "\n")  # no line follows the last line end

    def _is_decoded(self, text: str, line: int) -> bool:
        """Whether a line is valid in the encoding; if not, it is rejected."""
        if not unicode_problem(text):
            return True
        name = self.encoding.upper().removesuffix("-SIG")
        remedy = NOT_UTF8 if name == "UTF-8" else "name another --encoding"
        place, problem = f"{self.path}:{line}", f"not {name}; {remedy}"
        self.report.reject(f"line that is not {name}", place, problem)
        return False


def text_lines(path: Path, report: ReadReport) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends."""
    rest = ""
    for text in TextFile(path, report).blocks():
        *lines, rest = (rest + text).split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


def read_text(path: Path, encoding: str | None, report: ReadReport) -> str:
    """The text of a file; invalid bytes become lone surrogates. A hint reports a detected encoding.

    encoding: None: detect it.
    """
    with open_text(path, encoding, report) as (_, file):
        return file.read()


def _one_document(text: TextFile) -> Iterator[Document]:
    path, report = text.path, text.report
    for chunk in text:
        if chunk.strip():
            if "<|endoftext|>" in chunk:
                report.hint(
                    f"{path}: holds <|endoftext|> as plain text; if it separates documents, "
                    "use --document-separator '<|endoftext|>'"
                )
            report.read.setdefault(path, 1)
            yield Document(str(path), text)
            return
    report.reject("empty document", str(path), "nothing but white space")


def _separated_documents(text: TextFile, separator: str) -> Iterator[Document]:
    path, report = text.path, text.report
    pending, number = "", 0
    for block in text.blocks():
        searched = max(0, len(pending) - len(separator) + 1)
        pending += block
        if pending.find(separator, searched) >= 0:
            *whole, pending = pending.split(separator)
            for one in whole:
                if one := one.strip("\r\n"):
                    number += 1
                    yield from document(f"{path}, document {number}", one, report)
    report.read.setdefault(path, number + 1)
    if pending := pending.strip("\r\n"):
        yield from document(f"{path}, document {number + 1}", pending, report)
