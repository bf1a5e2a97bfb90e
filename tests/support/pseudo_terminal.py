"""Commands as a person sees them: a real process whose output is a terminal."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence

SCRIPT = (
    "import json, sys\nfrom gptsmith import cli\n"
    "for words in json.loads(sys.argv[1]):\n    cli.main(words)\n"
)


def shown(*commands: Sequence[object], piped: str = "") -> str:
    """What the commands, one after the other, write to a terminal without colours.

    piped: the standard input of the process.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, words], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(theirs)
    assert process.stdin is not None
    process.stdin.write(piped.encode())
    process.stdin.close()
    text = b"".join(pieces(ours)).decode().replace("\r\n", "\n")
    assert process.wait(120) == 0, text
    return text


def pieces(terminal: int) -> list[bytes]:
    """What is written to a terminal until its other side closes, as it arrives."""
    found = []
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says EIO where the other side has closed
            break
        if not piece:
            break
        found.append(piece)
    os.close(terminal)
    return found
