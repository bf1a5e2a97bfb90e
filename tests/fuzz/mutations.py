"""Damage done to files: flipped bits, cut and doubled pieces, other types in JSON."""

import gzip
import io
import json
import random
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 20  # bytes of a file that is mutated

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 1 << 15, (1 << 16) - 1, 1 << 31, (1 << 32) - 1, 1 << 63]
_NUMBERS += [(1 << 64) - 1, (1 << 31) - 1, (1 << 63) - 1]
_TEXTS = [
    b"\0", b"\n", b'"', b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"-1",
    b"Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b"{" * 3000, b"(" * 3000, b"a" * 70_000,
    b"null", b"true", b"{}", b"[]", b"../../etc/passwd", b"\x1b]0;x\x07", b"%s%n", b"{{ 7 * 7 }}",
    b"{% for i in range(99999) %}", b"{% break %}", b"!!python/object:os.system x", b"&a [*a]",
]  # fmt: skip
_GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 1 << 31, 1 << 63, 10**400, float("inf"), float("nan"), "",
    "x", "a" * 10_000, "\ud800", "\0", "\x1b[2J", [], {}, [[]], ["x"], [None], {"x": None}, [1],
    {"0": "x"}, [{}], "1", "../x",
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
    {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "xx"},
    {"type": "Sequence", "normalizers": [_GROWS] * 4},
    {"type": "Sequence", "decoders": [_GROWS] * 4},
    {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "ByteLevel"}]},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
    {"type": "Prepend", "prepend": "aa"},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
]  # fmt: skip
_SNIPPETS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = i ** 99 %}{% endfor %}", "{{ 9 ** 9999999 }}",
    "{% set ns = namespace(x='aaaa') %}"
    "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ '{:3000000000}'.format(1) }}", "{{ 'a' * 3000000000 }}", "{{ 'a' | center(900000000) }}",
    "{{ messages | tojson(indent=99999999) }}", "{{ 'a\\na' | indent(900000000) }}", "{% break %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ lipsum(99999) }}", "{{ cycler }}",
    "{% set messages = messages[1:] %}", "{% include 'x' %}", "{{ raise_exception('no') }}",
    "{{ messages | map(attribute='content') | join | length }}", "{{ self }}",
    "{% raw %}{{{% endraw %}",
    "{{ x.y.z }}", "{{ 1 // 0 }}", "{{ '%c' % -1 }}", "{{ strftime_now('%' * 9) }}", "{# a #}",
    "{% if loop is defined %}{{ loop.index }}{% endif %}", "{% filter upper %}a{% endfilter %}",
    "{{ bos_token }}", "{{ messages[0]['content'] | string | wordwrap(1) }}", "{% generation %}",
]  # fmt: skip


def mutated(data: bytes, name: str, others: list[bytes], rng: random.Random) -> bytes:
    """The file's bytes after one to three changes. others: files of the same parser, for pieces."""
    changes: list[Callable[[bytes], bytes]] = [lambda d: _bytes_changed(d, others, rng)]
    if name.endswith((".json", ".jsonl")):
        changes += 3 * [lambda d: _json_changed(d, rng)]
    if name.endswith(".jinja"):
        changes += 3 * [lambda d: _snippet_inserted(d, rng)]
    if name.endswith(".safetensors"):
        changes += 2 * [lambda d: _header_changed(d, rng)]
    if name.endswith((".pt", ".zip")):
        changes += 2 * [lambda d: _member_changed(d, others, rng)]
    if name.endswith(".gz"):
        changes += 2 * [lambda d: _content_changed(d, others, rng)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(changes)(data)
    return data


def _bytes_changed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    new, size = bytearray(data), len(data)
    at, length = rng.randrange(size + 1), rng.choice((1, 2, 4, 8, 50, 1000))
    match rng.randrange(-4, 9):
        case -4 | -3 | -2 | -1 | 0 | 1 if size:
            new[at % size] ^= 1 << rng.randrange(8)
        case 2:
            del new[at:]
        case 3:
            del new[at : at + length]
        case 4:
            new[at:at] = new[at : at + length] * rng.choice((1, 1, 2, 100))
        case 5:
            new[at : at + rng.choice((0, length))] = rng.choice(_TEXTS)
        case 6:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(_NUMBERS) % (1 << 8 * width)
            new[at : at + width] = number.to_bytes(width, order)
        case 7:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            new[at:] = other[start:]
        case _:
            new[at : at + length] = rng.randbytes(length)
    return bytes(new)


def _json_changed(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    which = rng.randrange(len(lines))
    try:
        root = [json.loads(lines[which])]
    except (ValueError, RecursionError):
        return data
    nodes: list[Any] = [root]
    for node in nodes:
        inner = node.values() if isinstance(node, dict) else node
        nodes += [value for value in inner if isinstance(value, dict | list) and value]
    # a vocabulary has thousands of values: each container is as likely as another
    node = rng.choice(nodes)
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    match rng.randrange(6):
        case 0 if node is not root:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice([*node, "x", ""])] = node.pop(key)
        case 2:
            node[key] = [node[key]]
        case 3 if isinstance(node[key], int | float):
            node[key] = node[key] * rng.choice((-1, 0, 2, 1000, 10**9)) + rng.choice((0, 1))
        case 4 if isinstance(node[key], str):
            node[key] = rng.choice((node[key] * 2, node[key][1:], f"{node[key]}\ud800"))
        case _:
            node[key] = rng.choice(_VALUES)
    lines[which] = json.dumps(root[0]).encode()
    return b"\n".join(lines)


def _snippet_inserted(data: bytes, rng: random.Random) -> bytes:
    """Jinja: something more after a statement, or a statement less."""
    statements = [*re.finditer(rb"\{%.*?%\}|\{\{.*?\}\}", data, re.DOTALL)]
    if not statements:
        return data
    chosen = rng.choice(statements)
    if rng.randrange(4):
        return data[: chosen.end()] + rng.choice(_SNIPPETS).encode() + data[chosen.end() :]
    return data[: chosen.start()] + data[chosen.end() :]


def _header_changed(data: bytes, rng: random.Random) -> bytes:
    """safetensors: eight bytes of length, a JSON header, the tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = _json_changed(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _member_changed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, OSError, zlib.error, NotImplementedError, EOFError):
        return data
    if not members:
        return data
    name = rng.choice([*members, *[name for name in members if name.endswith(".pkl")] * 5])
    members[name] = _bytes_changed(members[name], others, rng)
    with zipfile.ZipFile(new := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return new.getvalue()


def _content_changed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    try:
        content = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return data
    return gzip.compress(_bytes_changed(content, [content, *others], rng), 1)
