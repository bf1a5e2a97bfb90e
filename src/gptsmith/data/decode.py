"""Decode the bytes of a file: gzip, and detection of the encoding.

The same rules hold for all text formats. A byte order mark decides. Otherwise the text is UTF-8 if
nearly all of it is valid UTF-8 (readers reject the remaining lines one by one), UTF-16 if its zero
bytes indicate that, cp1252 if it then reads like Western European text. Other encodings are not
guessed and need --encoding.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TextIO

from gptsmith.data.report import ReadReport
from gptsmith.recognize import binary_kind, utf16

LINE_LIMIT = 16 << 20  # characters of a line, or of a row of a .csv
UTF8 = "utf-8-sig"  # with or without a byte order mark
NOT_UTF8 = "save the file as UTF-8, or name its encoding with --encoding"
_BLOCK = 1 << 20
_SAMPLE = 1 << 18
_RATIO = 250  # gzip reaches 1,000 on one repeated byte, and a tenth of this on repetitive logs

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The raw file, for its position, and its bytes, decompressed if it is a gzip file.

    ValueError for a damaged gzip file.
    """
    with path.open("rb") as raw:
        if raw.peek(2)[:2] != b"\x1f\x8b":  # whatever its name: browsers decompress downloads
            yield raw, raw
            return
        try:
            with gzip.open(raw) as file:
                yield raw, io.BufferedReader(file, _BLOCK)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error})") from None


@contextmanager
def open_text(
    path: Path, encoding: str | None, report: ReadReport, newline: str = ""
) -> Iterator[tuple[BinaryIO, TextIO]]:
    """The raw file, for its position, and its text. encoding: see detect_encoding. newline: as for
    `open`.

    Invalid bytes become lone surrogates, so that a reader can reject the line that contains them;
    strict decoding would fail at the end of a buffer, far from it. ValueError where that is
    impossible, as for half a character of UTF-16.
    """
    found = detect_encoding(path, encoding, report)
    with open_bytes(path) as (raw, file), decoding(path):
        yield raw, io.TextIOWrapper(file, found, "surrogateescape", newline)


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn a UnicodeDecodeError into a ValueError naming the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        name = error.encoding.upper()
        raise ValueError(f"{path}: not {name} ({error.reason}); {NOT_UTF8}") from None


def detect_encoding(path: Path, encoding: str | None, report: ReadReport) -> str:
    """The encoding of a file: as configured, or detected from its bytes, all of which are read.

    A hint reports a detected encoding other than UTF-8. ValueError for a file that is not text.
    """
    if encoding is not None:
        return UTF8 if codecs.lookup(encoding).name == "utf-8" else encoding
    status = path.stat()
    found = _detect(path, status.st_size, status.st_mtime_ns)
    if found == "cp1252":
        report.hint(
            f"{path}: read as cp1252, as it is not UTF-8 (if letters look wrong, name its "
            "--encoding)"
        )
    elif found not in ("utf-8", UTF8):
        report.hint(f"{path}: read as {found.upper()}")
    return found


@lru_cache(256)
def _detect(path: Path, size: int, modified: int) -> str:
    """Detect the encoding. size, modified: cache keys, so that a changed file is read again."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    total = valid = invalid = 0  # bytes: all, and those of characters beyond ASCII
    sample = bytearray()  # lines with such bytes
    with open_bytes(path) as (raw, file):
        block = file.read(_BLOCK)
        if marked := _encoding_of_head(path, block[:_SAMPLE]):
            return marked
        while block:
            text = decoder.decode(block)
            if not text.isascii():
                wrong = _count_escaped(text)
                invalid += wrong
                valid += len(block) - len(text)  # about: characters of two bytes count as one
                if wrong and len(sample) < _SAMPLE:
                    sample += b"".join(x for x in block.splitlines(True) if not x.isascii())
            total += len(block)
            if file is not raw and total > max(LINE_LIMIT, _RATIO * raw.tell()):
                raise ValueError(f"{path}: unpacks to more than {_RATIO} times its size: no text")
            block = file.read(_BLOCK)
    invalid += _count_escaped(decoder.decode(b"", final=True))
    return "cp1252" if invalid > 10 * valid and _is_western(bytes(sample[:_SAMPLE])) else "utf-8"


def _encoding_of_head(path: Path, head: bytes) -> str | None:
    """The encoding that the first bytes of a file determine; None if they do not."""
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    found = utf16(head)
    if found is None and (kind := binary_kind(head)):
        raise ValueError(f"{path} is {kind.what}, not text: {kind.use}")
    return found


def _count_escaped(text: str) -> int:
    try:
        text.encode()
    except UnicodeEncodeError:
        return len(re.findall("[\udc80-\udcff]", text))
    return 0


_SMALL, _CAPITAL = "a-zß-öø-þšžœ", "A-ZÀ-ÖØ-ÞŠŽŒŸ"
# What does not occur in Western languages: three accented letters in a row, an accented capital
# after a small letter, a symbol inside a word other than an apostrophe, dash or soft hyphen.
_NOT_WESTERN = re.compile(
    f"[À-ÖØ-öø-þŠŽŒšžœŸ]{{3,}}|(?<=[{_SMALL}])[À-ÖØ-ÞŠŽŒŸ]|ÿ"
    f"|(?<=[{_SMALL}{_CAPITAL}])[^\\x00-\\x7f{_SMALL}{_CAPITAL}’‘´·\xad–—…](?=[{_SMALL}{_CAPITAL}])"
)


def _is_western(sample: bytes) -> bool:
    """Whether the bytes read like Western European text in cp1252."""
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        return False
    beyond = sum(not character.isascii() for character in text)
    odd = sum(len(match.group()) for match in _NOT_WESTERN.finditer(text))
    return odd * 20 <= beyond
