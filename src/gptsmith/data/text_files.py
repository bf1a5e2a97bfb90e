"""Plain text files in bounded memory: one document, or several with a separator between them."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from gptsmith.data.decode import LINE_LIMIT, NOT_UTF8, UTF8, Encoding, find_encoding, opened
from gptsmith.data.documents import Document, document
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport

SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz")  # read in a folder, whatever else it holds

CHUNK_BYTES = 1 << 18  # read at a time


def text_documents(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """The file as one document, or several between separators."""
    separator, encoding = options.document_separator, find_encoding(path, options.encoding)
    if encoding.note:
        report.hint(f"{path}: read as {encoding.note}")
    if separator:
        return _separated(path, separator, encoding, report)
    return _whole(path, encoding, report)


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

    def __init__(self, path: Path, report: ReadReport, encoding: Encoding = UTF8) -> None:
        self.path, self.report, self.encoding = path, report, encoding

    def __iter__(self) -> Iterator[str]:
        parts: list[str] = []  # text after the last safe cut
        length = 0
        for text in _decoded(self.path, self.encoding, self.report):
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


def text_lines(path: Path, report: ReadReport) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends."""
    rest = ""
    for text in _decoded(path, UTF8, report):
        *lines, rest = (rest + text).split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


def read_text(path: Path, given: str | None, report: ReadReport) -> str:
    """The text of a file; bytes that are not in its encoding become lone surrogates. A hint says
    what encoding was found out."""
    encoding = find_encoding(path, given)
    if encoding.note:
        report.hint(f"{path}: read as {encoding.note}")
    with opened(path) as (_, file):
        data = file.read()
    name = "utf-8-sig" if encoding.is_utf8 else encoding.name
    try:
        return data.decode(name, "surrogateescape")
    except UnicodeDecodeError as error:
        raise _wrong_encoding(f"{path}, byte {error.start}", error) from None


def _whole(path: Path, encoding: Encoding, report: ReadReport) -> Iterator[Document]:
    chunks = TextFile(path, report, encoding)
    for chunk in chunks:
        if chunk.strip():
            if "<|endoftext|>" in chunk:
                report.hint(
                    f"{path}: holds <|endoftext|> as plain text; if it separates documents, "
                    "use --document-separator '<|endoftext|>'"
                )
            report.read.setdefault(path, 1)
            yield Document(str(path), chunks)
            return
    report.reject("empty document", str(path), "nothing but white space")


def _separated(
    path: Path, separator: str, encoding: Encoding, report: ReadReport
) -> Iterator[Document]:
    pending, number = "", 0
    for text in _decoded(path, encoding, report):
        searched = max(0, len(pending) - len(separator) + 1)
        pending += text
        if pending.find(separator, searched) >= 0:
            *whole, pending = pending.split(separator)
            for one in whole:
                if one := one.strip("\r\n"):
                    number += 1
                    yield from document(f"{path}, document {number}", one, report)
    report.read.setdefault(path, number + 1)
    if pending := pending.strip("\r\n"):
        yield from document(f"{path}, document {number + 1}", pending, report)


# --- decoding ------------------------------------------------------------------------------------


def _decoded(path: Path, encoding: Encoding, report: ReadReport) -> Iterator[str]:
    """The file's text, line ends unchanged, in blocks."""
    return _utf8(path, report) if encoding.is_utf8 else _other(path, encoding, report)


def _other(path: Path, encoding: Encoding, report: ReadReport) -> Iterator[str]:
    decoder, offset = codecs.getincrementaldecoder(encoding.name)(), 0
    with opened(path) as (raw, file):
        try:
            while block := file.read(CHUNK_BYTES):
                yield decoder.decode(block)
                offset += len(block)
                report.reached(path, raw.tell())
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _wrong_encoding(f"{path}, after byte {offset}", error) from None


def _wrong_encoding(place: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{place}: not {error.encoding} ({error.reason}); name another --encoding")


def _utf8(path: Path, report: ReadReport) -> Iterator[str]:
    """Blocks end after a line where possible: lines that are not UTF-8 are rejected one by one."""
    with opened(path) as (raw, file):
        start = file.read(3)
        pending = start.removeprefix(codecs.BOM_UTF8)
        offset, line = len(start) - len(pending), 1
        while block := file.read(CHUNK_BYTES):
            pending += block
            end = pending.rfind(b"\n") + 1
            # a line longer than a block is cut, unless it may have to be skipped as a whole
            if not end and (not report.skips or len(pending) > LINE_LIMIT):
                end = _last_character(pending)
            yield _decode(pending[:end], path, offset, line, report)
            offset, line = offset + end, line + pending.count(b"\n", 0, end)
            pending = pending[end:]
            report.reached(path, raw.tell())
        yield _decode(pending, path, offset, line, report)
        if report.skips:
            report.read[path] = line


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
                f"{place}: not UTF-8 ({error.reason}); {NOT_UTF8}, "
                "or skip such lines with --on-error skip"
            ) from None
    good = []
    for number, one in enumerate(data.splitlines(keepends=True), line):
        try:
            good.append(one.decode())
        except UnicodeDecodeError:
            report.reject("line that is not UTF-8", f"{path}:{number}", "")
    return "".join(good)
