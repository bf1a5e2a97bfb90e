"""`make bench`: every benchmark, each in a process of its own. `python -m benchmarks NAME [ARG...]`
runs one. Figures worth keeping go to docs/log.md, with the machine they were measured on.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in HERE.glob("[a-z]*.py"))


def words(name: str, argv: list[str]) -> list[str]:
    code = f"import sys; from benchmarks.{name} import main; main(sys.argv[1:])"
    return [sys.executable, "-c", code, *argv]


def main(argv: list[str]) -> int:
    """The worst exit code. A benchmark whose device is missing says so and exits with 0."""
    if argv and argv[0] not in NAMES:
        print(f"no benchmark {argv[0]!r}: choose from {', '.join(NAMES)}", file=sys.stderr)
        return 2
    os.chdir(HERE.parent)
    if argv:
        os.execv(sys.executable, words(argv[0], argv[1:]))  # signals reach it
    worst = 0
    for name in NAMES:
        print(f"\n== {name}", flush=True)
        worst = max(worst, subprocess.run(words(name, [])).returncode)
    return worst


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
