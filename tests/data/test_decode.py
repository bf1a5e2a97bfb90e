"""The encoding of a file is detected only where its bytes leave no doubt."""

import gzip
from pathlib import Path

import pytest

from gptsmith.data.decode import detect_encoding
from gptsmith.data.report import ReadReport

GERMAN = "Größe und Maß der Straßen in München – „alles“ für 5 €. " * 20
FRENCH = "L’été a été très beau à l’île d’Aix, « n’est-ce pas ? » Où ça ? " * 20
SPANISH = "¿Dónde está el niño? ¡Mañana por la mañana! " * 20


def found(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return detect_encoding(path, None, ReadReport())


@pytest.mark.parametrize("text", [GERMAN, FRENCH, SPANISH, "caf\xe9"])
def test_western_texts_are_read_as_cp1252(tmp_path: Path, text: str) -> None:
    assert found(tmp_path / "a.txt", text.encode("cp1252")) == "cp1252"
    assert found(tmp_path / "b.txt", text.encode()) == "utf-8"
    assert found(tmp_path / "c.txt", b"plain " * 300_000 + text.encode("cp1252")) == "cp1252"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Привет, мир! Всё хорошо. ", "cp1251"),
        ("Привет, мир! Всё хорошо. ", "koi8-r"),
        ("Καλημέρα κόσμε, τι κάνεις; ", "cp1253"),
        ("שלום עולם, מה שלומך? ", "cp1255"),
        ("こんにちは世界、元気ですか。", "shift_jis"),
        ("你好，世界。今天天气很好。", "gb18030"),
        ("안녕하세요 세계 ", "euc-kr"),
        ("zażółć gęślą jaźń, łódź i źdźbło ", "cp1250"),
        ("Größe und Maß der Straßen, schöne Grüße ", "mac_roman"),
        ("Größe und Maß der Straßen, schöne Grüße ", "cp850"),
    ],
)
def test_other_encodings_are_not_guessed(tmp_path: Path, text: str, encoding: str) -> None:
    data = (text * 9).encode(encoding)
    assert found(tmp_path / "a.txt", data) == "utf-8"  # its lines are then rejected
    assert detect_encoding(tmp_path / "a.txt", encoding, ReadReport()) == encoding


def test_a_few_damaged_bytes_do_not_change_the_encoding(tmp_path: Path) -> None:
    assert found(tmp_path / "a.txt", GERMAN.encode() + b"caf\xe9\n") == "utf-8"
    assert found(tmp_path / "b.txt", b"fine\nnot \xff fine\n") == "utf-8"


@pytest.mark.parametrize("text", ["plain ASCII\n", "日本語 テキスト\n", "Grüße 🙂\n"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark(tmp_path: Path, text: str, encoding: str) -> None:
    assert found(tmp_path / "a.txt", text.encode(encoding)) == encoding


def test_a_zero_byte_in_ascii_is_not_utf16(tmp_path: Path) -> None:
    for text in (b'{"tex\0t": "some words"}\n', b'{"a": "caf\xe9", "t\0": "tw", "l": "b"}\n' * 20):
        assert found(tmp_path / "a.jsonl", text) in ("utf-8", "cp1252")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PK\x03\x04\x14\0\x06\0", "a ZIP archive"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a picture"),
        (b"\x28\xb5\x2f\xfd\x04\x58", "a zstd file"),
        (b"\0\1\2\3" * 9, "a binary file"),
        (b"text" * 5 + bytes(range(32)), "a binary file"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.csv is {what}.*, not text: "):
        found(tmp_path / "a.csv", data)


def test_a_compressed_bomb_is_rejected(tmp_path: Path) -> None:
    data = gzip.compress(b'{"text": "' + b"a" * (30 << 20))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: unpacks to more than 250 times its size"):
        found(tmp_path / "a.jsonl.gz", data)
