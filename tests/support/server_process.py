"""`gptsmith serve` in a process of its own."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from runs import GPTSMITH


@contextmanager
def serving(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process, which leads a group of its own, and the URL that it printed."""
    with subprocess.Popen(
        [*GPTSMITH, "serve", *map(str, words), "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            lines = []
            while not lines or "chat page" not in lines[-1]:
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr and process.stderr.read()
            [url] = re.findall(r"chat page: (\S+)", lines[-1])
            yield process, url
        finally:
            process.kill()
