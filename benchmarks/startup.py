"""(d) Start-up times: each command in a fresh process, alternating, medians."""

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "gptsmith --help": [sys.executable, "-m", "gptsmith", "--help"],
    "gptsmith pretrain --help": [sys.executable, "-m", "gptsmith", "pretrain", "--help"],
    "gptsmith generate --help": [sys.executable, "-m", "gptsmith", "generate", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "from gptsmith import GPTModel": [sys.executable, "-c", "from gptsmith import GPTModel"],
    "from transformers import GPT2LMHeadModel": [
        sys.executable,
        "-c",
        "from transformers import GPT2LMHeadModel",
    ],
}


def main(argv: Sequence[str]) -> None:
    """Print medians over the rounds, after one with cold caches that does not count."""
    rounds = int(argv[0]) if argv else 5
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    print(f"start-up, median of {rounds} rounds")
    for name, taken in seconds.items():
        print(f"  {name:<42} {statistics.median(taken[1:]):7.3f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
