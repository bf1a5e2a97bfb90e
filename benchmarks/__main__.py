"""`make bench`: every benchmark, each in a process of its own. `python -m benchmarks NAME [ARG...]`
runs one. Figures worth keeping go to docs/log.md, with the machine they were measured on.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in HERE.glob("[a-z]*.py"))


def run(name: str, argv: list[str]) -> int:
    code = f"import sys; from benchmarks.{name} import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=HERE.parent).returncode


def main(argv: list[str]) -> int:
    """The worst exit code. A benchmark whose device is missing says so and exits with 0."""
    if argv and argv[0] not in NAMES:
        print(f"no benchmark {argv[0]!r}: choose from {', '.join(NAMES)}", file=sys.stderr)
        return 2
    worst = 0
    for name in argv[:1] or NAMES:
        print(f"\n== {name}", flush=True)
        worst = max(worst, run(name, argv[1:]))
    return worst


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
