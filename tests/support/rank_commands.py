"""Several commands of gptsmith, one after another, on ranks that start once.

As a script, it is one of these ranks.
"""

import json
import os
import sys
from collections.abc import Sequence

import torch
from ranks import finish, start

from gptsmith import cli
from gptsmith.train import distributed


def on_all(count: int, commands: Sequence[Sequence[str]]) -> None:
    """Run the commands on so many ranks, each with one thread; all must succeed."""
    words = [__file__, json.dumps(commands)]
    done = finish(start(count, words, PYTHONPATH=os.pathsep.join(sys.path)))
    assert all(code == 0 for code, _, _ in done), done


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.connected():
        sys.exit(max(map(cli.main, json.loads(sys.argv[1]))))
