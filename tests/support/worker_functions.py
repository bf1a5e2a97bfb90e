"""Functions that tests of the sandbox run in its worker."""

import os
from collections.abc import Iterator
from typing import Any


def answer(*values: Any) -> Any:
    return [*values, os.getpid()]


def with_bytes(size: int) -> tuple[dict[str, int], bytes]:
    return {"size": size}, bytes(size)


def count(to: int, then: str = "") -> Iterator[int]:
    yield from range(to)
    if then:
        fail(then)


def fail(how: str) -> Any:
    match how:
        case "ValueError":
            raise ValueError("a.txt: wrong")
        case "FileNotFoundError":
            os.stat("/nowhere/at/all")
        case "KeyError":
            raise KeyError("x")
        case "BaseException":
            raise BaseException("a panic\nof another language")  # as pyo3 does
        case "loop":
            while True:
                pass
        case "one long call":
            return 9**99_999_999 > 1
        case "memory":
            return len(bytearray(6 << 30))
        case "many small":
            return len([[i] for i in range(1 << 40)])
        case "large result":
            return "a" * (50 << 20)
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "prints":
            os.system("echo printed; echo printed >&2")
            return "fine"
