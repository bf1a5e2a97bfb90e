"""The files of a reader, which the commands of the pages use."""

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "fixtures" / "data"

RULE = """\
def strided(b, h, q, k):
    return (k <= q) & ((q - k < 16) | ((q - k) % 16 == 0))
"""


def make_inputs(folder: Path, demo: Path = ROOT) -> None:
    """Files of a reader's own, which the pages use, and the place of the demo's runs.

    demo: the folder of a demo whose runs are copied, if they are there.
    """
    (folder / "runs").mkdir()
    for name in ("demo", "demo-chat"):
        (folder / "runs" / name).symlink_to(Path("..", "demo", "runs", name))
    if (demo / "runs" / "demo-chat" / "model.safetensors").is_file():
        for name in ("demo", "demo-chat"):
            shutil.copytree(demo / "runs" / name, folder / "demo" / "runs" / name)
    (folder / "LICENSE").symlink_to(ROOT / "LICENSE")
    (folder / "configs").symlink_to(ROOT / "configs")
    _write_rows(folder / "rows.jsonl")
    _write_pairs(folder / "pairs.jsonl")
    _write_chats(folder / "chat.jsonl")
    (folder / "rules.py").write_text(RULE)
    shutil.copy(DATA / "sms_spam" / "SMSSpamCollection", folder / "sms.tsv")


def _write_rows(path: Path) -> None:
    rows = [
        json.dumps({"title": f"Note {i}", "text": f"Note {i}: {i} + {i} is {2 * i}."})
        for i in range(1, 41)
    ]
    rows[1] = rows[1][:-12]  # as if the disk had been full
    path.write_text("".join(f"{row}\n" for row in rows))


def _write_pairs(path: Path) -> None:
    pairs = [
        dict(prompt=f"What is {a} + {b}?", chosen=f"{a + b}", rejected=f"It is {a - b}, I guess.")
        for a in range(3, 13)
        for b in range(1, 9)
    ]
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))


def _write_chats(path: Path) -> None:
    """Conversations, of which one has an answer longer than the demo's context."""
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    chats = [
        (f"When does the {place} open on {day}?", f"At {hour}.", "And close?", f"At {hour + 8}.")
        for hour, place in enumerate(("bakery", "market", "pool", "library", "museum"), 6)
        for day in days
    ]
    rules = (
        "Please shower before you swim, walk at the edge, keep bottles of glass in your locker, "
        "leave the lanes to those who train, dive at the deep end only, watch your children, "
        "bring a towel of your own, and leave when the bell rings, a quarter of an hour before we "
        "close."
    )
    chats[1] = ("What are the rules of the pool?", rules, "Thank you!", "You are welcome.")
    with path.open("w") as file:
        for chat in chats:
            turns = zip(("user", "assistant") * 2, chat, strict=True)
            messages = [dict(role=role, content=content) for role, content in turns]
            file.write(f"{json.dumps(dict(messages=messages))}\n")
