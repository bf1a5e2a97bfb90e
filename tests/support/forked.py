"""Run `gptsmith` commands one after the other in forks of this process, which imports torch once.

Standard input: a JSON list of commands, each a list of arguments. The commands share the output
streams. The exit code is that of the first one that fails, which is also named on standard error.
"""

import json
import os
import sys
from importlib import import_module

from failing_disk import import_all

from gptsmith.data.stdlib import pydocs


def main() -> int:
    commands = json.load(sys.stdin)
    import_all()
    import_module("torch._dynamo")  # which the first optimizer imports, in 2 s
    list(pydocs())  # parsed once for all commands
    for arguments in commands:
        child = os.fork()
        if child == 0:
            _run(arguments)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            print(f"{arguments} ended with {code}", file=sys.stderr)
            return code
    return 0


def _run(arguments: list[str]) -> None:
    from gptsmith import cli

    code = 1
    try:
        code = cli.main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
