"""Run the steps of a page one after the other, in forks of this process, which imports torch once.

Standard input: a JSON list of [kind, what] (documented_commands.Step). The steps share the output
streams. The exit code is that of the first one that fails, which is also named on standard error.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from failing_disk import import_all

from gptsmith.data.stdlib import pydocs


def main() -> int:
    steps = json.load(sys.stdin)
    import_all()
    import_module("torch._dynamo")  # which the first optimizer imports, in 2 s
    list(pydocs())  # parsed once for all commands
    for kind, what in steps:
        if code := _run(kind, what):
            print(f"{kind} {what} ended with {code}", file=sys.stderr)
            return code
    return 0


def _run(kind: str, what: str | list[str]) -> int:
    sys.stdout.flush()
    match kind, what:
        case "gptsmith", [*words]:
            return _in_a_fork(lambda: _gptsmith(words))
        case "python", str(program):
            return _in_a_fork(lambda: _python(program))
        case "file", [name, text]:
            Path(name).write_text(text)
            return 0
        case _:
            return subprocess.run(["bash", "-c", what], check=False).returncode


def _gptsmith(words: list[str]) -> int:
    from gptsmith import cli

    while "=" in words[0]:  # NAME=value gptsmith ...
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value

    return cli.main(words)


def _python(program: str) -> int:
    exec(compile(program, "<page>", "exec"), {"__name__": "__main__"})
    return 0


def _in_a_fork(function: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        code = function()
        sys.stdout.flush()
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
