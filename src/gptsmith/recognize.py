"""Recognize what a path is (a run, a corpus, a table, a text) by file names and first bytes.

A command that gets the wrong kind of path says what it is and which command takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")  # each also .gz
COLUMNAR = (".parquet", ".arrow")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npy", ".npz")
_HEAD = 4096

# First bytes -> what it is, and how to get at its text.
_UNPACK = "unpack it first"
_GGUF = "a GGUF model", "import the model that it was made from"
_LFS = b"version https://git-lfs.github.com/spec/"
_MAGIC: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (
    (b"%PDF-", "a PDF", "extract its text first"),
    (_LFS, "a Git LFS pointer", "git lfs pull fetches the file that it stands for"),
    (
        b"PK\x03\x04",
        "a ZIP archive (so are .xlsx, .docx and .epub files)",
        "unpack it, save a sheet as .csv or a document as .txt",
    ),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a document of an older Office",
        "save a sheet as .csv or a text as .txt",
    ),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\0", "an xz file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "name it .arrow"),
    (b"SQLite format 3\0", "an SQLite database", "export a table as .csv"),
    (b"GGUF", *_GGUF),
    (b"\x93NUMPY", "a NumPy array", "give the text that it was made of"),
    (b"\x7fELF", "a program", "give its source"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "a picture", "give text"),
    (b"RIFF", "a sound, picture or video", "give text"),
    ((b"\x80\x02", b"\x80\x04\x95", b"\x80\x05\x95"), "a pickle", "export it as .jsonl or .csv"),
)


class Kind(NamedTuple):
    """what: "a prepared corpus". use: what to do with it, for a message."""

    what: str
    use: str


def wrong_kind(path: Path, wanted: str) -> ValueError | FileNotFoundError:
    """The error for a path that is not `wanted`: what it is instead, and what to do with it."""
    if not path.exists():
        return FileNotFoundError(f"{path}: no such file or folder")
    what, use = recognize(path)
    return ValueError(f"{path} is {what}, not {wanted}: {use}")


def is_artifact(path: Path) -> bool:
    """Whether a path is an artifact of gptsmith or of another trainer, rather than data."""
    is_part = path.suffix == ".npy" or path.name in ("manifest.json", "tokenizer.json")
    return _artifact(path) is not None if path.is_dir() else is_part and is_corpus(path.parent)


def recognize(path: Path) -> Kind:
    """The kind of an existing path."""
    return _folder(path) if path.is_dir() else _file(path)


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder."""
    return (path / "config.yaml").is_file() and (path / "model.json").is_file()


def is_corpus(path: Path) -> bool:
    """Whether `path` is a prepared corpus, perhaps an unfinished one."""
    names = ("manifest.json", "unfinished/progress.json", "unfinished/manifest.json")
    return not is_checkpoint(path) and any((path / name).is_file() for name in names)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a model in GGUF, whatever its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint of a run, which has a manifest.json too."""
    return (path / "manifest.json").is_file() and (path / "state.json").is_file()


# --- folders -------------------------------------------------------------------------------------


def _artifact(path: Path) -> Kind | None:
    if is_run(path):
        use = f"gptsmith generate {path} continues texts, gptsmith finetune ... --from {path}"
        return Kind("a run", f"{use} tunes it")
    if is_checkpoint(path):
        return Kind("a checkpoint", f"give its run folder {path.parent.parent} and --checkpoint")
    if is_corpus(path):
        return Kind("a prepared corpus", f"gptsmith pretrain --data {path} trains on it")
    if (path / "adapter_config.json").is_file():
        return Kind("an adapter", "merge it into its base, or give the run that it is from")
    if (path / "config.json").is_file():
        return Kind("a Hugging Face model", f"gptsmith import {path} --out RUN makes a run of it")
    return None


def _folder(path: Path) -> Kind:
    if made := _artifact(path):
        return made
    inside = sorted(path.iterdir())
    for what, is_kind in (("runs", is_run), ("prepared corpora", is_corpus)):
        if found := [child.name for child in inside if child.is_dir() and is_kind(child)]:
            return Kind(f"a folder of {what}", f"give one of them: {_first_names(found)}")
    if not inside:
        return Kind("an empty folder", "give another one")
    use = f"gptsmith prepare {path} --out data/NAME makes a corpus of its texts or tables"
    if all(child.name.lower().endswith((".gguf", *_WEIGHTS)) for child in inside):
        use = _file(inside[0]).use
    return Kind(f"a folder with {_first_names([child.name for child in inside])}", use)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# --- files ---------------------------------------------------------------------------------------


def _file(path: Path) -> Kind:
    name = path.name.lower()
    if not path.is_file():
        return Kind("neither a file nor a folder", "write its content to a file")
    for what, is_kind in (("run", is_run), ("corpus", is_corpus)):
        if is_kind(path.parent):
            return Kind(f"a file of the {what} {path.parent}", "give that folder")
    if name.removesuffix(".gz").endswith(TABLES) or name.endswith(COLUMNAR):
        return Kind(
            "a table",
            f"gptsmith finetune chat, instruct or classify --data {path} trains on its rows, "
            f"gptsmith prepare {path} --out data/NAME makes a corpus of a column",
        )
    if name.endswith((".yaml", ".yml")):
        return Kind("a recipe", f"gptsmith pretrain {path} ... or gptsmith finetune KIND {path}")
    if name.endswith(".gguf"):
        return Kind(*_GGUF)
    if name.endswith(_WEIGHTS):
        return Kind("a file of weights or arrays", "gptsmith import takes a model's folder")
    with path.open("rb") as file:
        binary = binary_kind(file.read(_HEAD))
    use = f"gptsmith prepare {path} --out data/NAME makes a corpus of it"
    return binary or Kind("a text file", use)


def binary_kind(head: bytes) -> Kind | None:
    """The kind of a file that begins with these bytes, if it is certainly not text."""
    has_no_text = b"\0" in head or not head.isascii()
    for magic, what, use in _MAGIC:
        if head.startswith(magic) and (has_no_text or magic in (b"%PDF-", _LFS)):
            return Kind(what, use)
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or utf16(head):
        return None
    controls = len(head) - len(head.translate(None, _CONTROLS))
    return Kind("a binary file", "give text or a table") if controls * 20 > len(head) else None


# \b for overstruck text, \x1a as the end of a DOS file, \x1b for colours
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1a\x1b"))


def utf16(head: bytes) -> str | None:
    """utf-16-le or utf-16-be if a file without byte order mark that begins with these bytes is text
    in it, that is, contains spaces and other ASCII and only printable characters. (ASCII text with
    a stray zero byte decodes to Chinese; real Chinese has many bytes beyond ASCII.)"""
    if b"\0" not in head:
        return None
    found, most = None, 0
    beyond_ascii = len(head) - len(head.decode("ascii", "ignore"))
    for name in ("utf-16-le", "utf-16-be"):
        text = head[: len(head) // 2 * 2].decode(name, "replace").removesuffix("\ufffd")
        count = sum(character.isascii() for character in text)
        printable = all(c.isprintable() or c.isspace() for c in text) and "\ufffd" not in text
        least = 20 if beyond_ascii * 6 > len(head) else 2
        if printable and count * least > len(text) and count > most:
            found, most = name, count
    return found
