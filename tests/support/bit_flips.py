"""Flips random bits in a corpus and in runs, and uses them by every command that reads them.

    python tests/support/bit_flips.py [NUMBER] [SEED]     (make test-flips: 1,000)

After a flip, a command may say what is damaged, in one line and with exit code 2, or give the
result that it gave before. Another result is silent damage; any other end is a traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from gptsmith import cli

SMALL = (
    "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16",
    "--model.context-length", "32", "--train.batch-size", "4", "--train.num-threads", "1",
    "--monitor.trackers", "none", "--eval.tokens", "500", "--eval.sample-tokens", "0",
    "--eval.interval", "3", "--save.interval", "2", "--train.device", "cpu",
    "--monitor.log-interval", "1",
)  # fmt: skip
LORA = (
    "--train.steps", "4", "--train.batch-size", "4", "--train.num-threads", "1", "--lora.rank", "2",
    "--monitor.trackers", "none", "--eval.sample-tokens", "0", "--save.interval", "2",
    "--train.device", "cpu", "--monitor.log-interval", "1",
)  # fmt: skip


class Ended(NamedTuple):
    """How a command ended. result: what it printed or wrote, the parts that depend on the time
    left out."""

    code: int
    result: object
    errors: str


class Flip(NamedTuple):
    """A flipped bit of a file, the command that was used on it, and how that ended.

    outcome: "named", "same" or a fault: "silent", "error" (any end that a user should not see).
    """

    file: str
    byte: int
    bit: int
    command: str
    outcome: str
    ended: Ended


def gptsmith(*words: str | Path) -> Ended:
    """A command in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = cli.main([*map(str, words)])
    return Ended(code, out.getvalue(), errors.getvalue())


def make(folder: Path) -> None:
    """corpus/, full/ (pretrained), lora/ (tuned further on the same corpus), chat/ (tokenized
    conversations) and classes/ (a classifier)."""
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "home"]
    text = "\n\n".join(" ".join(rng.choices(words, k=60)) + "." for _ in range(60))
    (folder / "text.txt").write_text(text)
    corpus = folder / "corpus"
    chats = [
        {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": b}]}
        for a in words for b in words[:4]
    ]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    rows = [f"{a} {b},{'long' if len(a) > 2 else 'short'}\n" for a in words for b in words[:4]]
    (folder / "rows.csv").write_text("".join(["text,label\n", *rows]))
    (folder / "chat").mkdir()
    for command in (
        ("prepare", folder / "text.txt", "--out", corpus, "--tokenizer", "bpe", "--vocab-size",
         "300", "--shard-tokens", "1500", "--document-separator", "\\n\\n"),
        ("pretrain", "--data", corpus, "--out", folder / "full", "--train.steps", "6", *SMALL),
        ("finetune", "text", "--from", folder / "full", "--data", corpus, "--out", folder / "lora",
         *LORA),
        ("prepare", folder / "chats.jsonl", "--format", "chat", "--tokenizer", folder / "full",
         "--out", folder / "chat" / "chats.arrow"),
        ("finetune", "classify", "--from", folder / "full", "--data", folder / "rows.csv", "--out",
         folder / "classes", "--texts-per-step", "8", *LORA),
    ):  # fmt: skip
        ended = gptsmith(*command)
        assert ended.code == 0, ended.errors


def trained(ended: Ended, run: Path) -> Ended:
    """The result of training: losses, and all final weights."""
    if ended.code:
        return ended
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(e["event"], e["step"], e.get("train_loss"), e.get("val_loss")) for e in events]
    weights = sorted([*run.glob("*.safetensors"), *run.glob("adapter/*.safetensors")])
    tensors = [(n, t.tolist()) for path in weights for n, t in sorted(load_file(path).items())]
    return ended._replace(result=([loss for loss in losses if loss[0] != "note"], tensors))


def commands(folder: Path) -> dict[str, Callable[[], Ended]]:
    """Each on the copies of corpus and runs in `folder`."""
    corpus, full, lora, new = (folder / name for name in ("corpus", "full", "lora", "new"))
    chats, classes = folder / "chat" / "chats.arrow", folder / "classes"
    length, fixed = ("--max-new-tokens", "8"), ("--device", "cpu")

    def train(*words: str | Path) -> Ended:
        shutil.rmtree(new, ignore_errors=True)
        return trained(gptsmith(*words, "--out", new), new)

    def resume(kind: tuple[str, ...], run: Path, steps: str) -> Ended:
        return trained(gptsmith(*kind, "--out", run, "--resume", "--train.steps", steps), run)

    return {
        "corpus: inspect": lambda: gptsmith("inspect", corpus),
        "corpus: evaluate": lambda: gptsmith("evaluate", full, "--data", corpus, *fixed),
        "corpus: pretrain": lambda: train(
            "pretrain", "--data", corpus, *SMALL, "--train.steps", "3"
        ),
        "full: inspect": lambda: gptsmith("inspect", full),
        "full: evaluate": lambda: gptsmith("evaluate", full, *fixed),
        "full: generate": lambda: gptsmith("generate", full, "--temperature", "0", *length, *fixed),
        "full: best": lambda: gptsmith(
            "generate", full, "--checkpoint", "best", "--temperature", "0", *length, *fixed
        ),
        "full: resume": lambda: resume(("pretrain",), full, "8"),
        "lora: inspect": lambda: gptsmith("inspect", lora),
        "lora: generate": lambda: gptsmith("generate", lora, "--temperature", "0", *length, *fixed),
        "lora: resume": lambda: resume(("finetune", "text"), lora, "6"),
        "chat: finetune": lambda: train("finetune", "chat", "--from", full, "--data", chats, *LORA),
        "classes: classify": lambda: gptsmith("classify", classes, "the cat sat", *fixed),
        "classes: resume": lambda: resume(("finetune", "classify"), classes, "6"),
    }


def outcome(ended: Ended, reference: Ended) -> str:
    """As of Flip. A table or a note may name the damage beside a result."""
    named = "damaged" in ended.errors or "damaged" in str(ended.result)
    if ended.code == 2 and "Traceback" not in ended.errors:
        return "named" if ended.errors.strip() else "error"
    if ended.code != 0:
        return "error"
    if ended.result == reference.result:
        return "named" if named else "same"
    return "named" if named else "silent"  # resumed from an older checkpoint, it says so


def flips(number: int, seed: int, folder: Path) -> Iterator[Flip]:
    """Flips, one at a time: of files chosen at random and of bytes chosen at random, by turns."""
    torch.set_num_threads(1)
    whole, work, rng = folder / "whole", folder / "work", random.Random(seed)
    whole.mkdir()
    make(whole)

    def use(command: str, damaged: Path | None = None, data: bytes = b"") -> Ended:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        if damaged is not None:
            (work / damaged).write_bytes(data)
        return commands(work)[command]()

    references = {name: use(name) for name in commands(work)}
    assert not any(r.code for r in references.values()), references
    paths = [p for p in sorted(whole.rglob("*")) if p.is_file() and p.parent != whole]
    paths = [path for path in paths if path.stat().st_size]
    sizes = [path.stat().st_size for path in paths]
    for i in range(number):
        path = rng.choice(paths) if i % 2 else rng.choices(paths, sizes)[0]
        name, data = path.relative_to(whole), bytearray(path.read_bytes())
        byte, bit = rng.randrange(len(data)), rng.randrange(8)
        data[byte] ^= 1 << bit
        command = rng.choice([c for c in references if c.startswith(f"{name.parts[0]}:")])
        ended = use(command, name, bytes(data))
        yield Flip(str(name), byte, bit, command, outcome(ended, references[command]), ended)


def main(number: int = 1000, seed: int = 0) -> int:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for flip in flips(number, seed, Path(folder)):
            counts[flip.outcome] += 1
            if flip.outcome in ("silent", "error"):
                print(*flip[:5], flip.ended.code, flip.ended.errors[-300:], flush=True)
            if counts.total() % 100 == 0:
                print(dict(counts), flush=True)
    print(f"{number} flips:", ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
    return int(counts["silent"] + counts["error"] > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
