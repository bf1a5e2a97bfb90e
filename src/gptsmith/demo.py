"""`gptsmith demo`: all stages from text to chat model, on data that every Python installation has.

Each stage is a command that a user could type, and is printed before it runs. Skills are scored on
held-out questions before and after chat tuning, and after practice by reward, if it is asked for.
The work is fixed, not its time, so the result does not depend on the speed of the machine.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from rich.table import Table

from gptsmith import files, terminal
from gptsmith.chat_template.template import Message
from gptsmith.commands import evaluate, finetune, generate, prepare, pretrain
from gptsmith.config import Section, load_config
from gptsmith.console import Console
from gptsmith.generate.options import SamplingConfig
from gptsmith.run import layout
from gptsmith.train.monitor import read_events

if TYPE_CHECKING:
    from gptsmith.evaluate.skills import Scores
    from gptsmith.run import Run

PROMPTS = ("The function returns", "def ", "Raises ValueError if")
CONVERSATIONS = (
    ("Hello.", "Who are you?", "What can you do?"),
    ("Hello, my name is Ada.", "Reverse the word planet.", "What is my name?"),
    ("What is 12 + 30?", "Which is larger, 17 or 71?", "Thank you."),
    ("Write garden in capital letters.", "How many e are in between?"),
    ("What does the os module do?", "What is the capital of France?", "Goodbye."),
)
SKILLS = "skills.json"  # scores, left in each run folder


class DemoConfig(Section):
    """Train a small GPT on your own Python's documentation, tune it to answer, and talk to it."""

    folder: Path = Path()
    """Where data/ and runs/ are created."""
    steps: int = Field(480, ge=1)
    """Steps of pretraining."""
    chat_steps: int = Field(1320, ge=1)
    """Steps of chat tuning."""
    questions: int = Field(40_000, ge=1)
    """Conversations to generate for chat tuning."""
    reward: bool = False
    """Also let the chat model practise: questions without answers, and a reward for right ones."""
    reward_steps: int = Field(200, ge=1)
    """Steps of practice."""
    per_skill: int = Field(50, ge=1)
    """Questions for each skill, before and after."""


def main(argv: Sequence[str]) -> int:
    """`gptsmith demo [--folder DIR] [--steps N]`: the stages below, one after the other."""
    config = load_config(DemoConfig, argv, prog="gptsmith demo")
    from gptsmith.budget.machine import measure_step
    from gptsmith.evaluate import skills  # imports torch: not before help and option errors
    from gptsmith.model.config import ModelConfig
    from gptsmith.run import Run

    console = Console()
    corpus = config.folder / "data" / "pydocs"
    runs = config.folder / "runs"
    base, tuned, practised = runs / "demo", runs / "demo-chat", runs / "demo-reward"
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    stages: list[tuple[str, Path | None, list[str | Path]]] = [
        ("text -> tokens", None, ["prepare", "pydocs", "--tokenizer", "byte", "--out", corpus]),
        ("tokens -> model", base, [
            "pretrain", "--data", corpus, "--out", base,
            *(word for name, size in SIZES.items() for word in (_flag(name), str(size))),
            "--train.batch-size", str(BATCH), "--train.steps", str(config.steps), *LEARNING,
            "--eval.interval", "200", "--eval.tokens", "16384", "--eval.prompt", PROMPTS[0],
        ]),
        ("model -> text", None, [
            "generate", base, *prompts, "--max-new-tokens", "160", "--temperature", "0.7",
        ]),
        ("skills before chat tuning", None, _scoring(base, config)),
        ("model -> chat model", tuned, [
            "finetune", "chat", "--from", base, "--data", "skills", "--out", tuned,
            "--questions", str(config.questions), "--val-fraction", "0.01",
            "--train.batch-size", str(BATCH), "--train.steps", str(config.chat_steps), *LEARNING,
            "--eval.interval", "300", "--eval.tokens", "16384", "--eval.sample-tokens", "40",
        ]),
        ("skills after chat tuning", None, _scoring(tuned, config)),
    ]  # fmt: skip
    if config.reward:
        stages += [
            ("chat model -> practised chat model", practised, [
                "finetune", "reward", "--from", tuned, "--data", "skills", "--out", practised,
                "--train.steps", str(config.reward_steps), *PRACTICE,
            ]),
            ("skills after practice", None, _scoring(practised, config)),
        ]  # fmt: skip
    trainings = {base: config.steps, tuned: config.chat_steps}
    if left := sum(steps for run, steps in trainings.items() if not _is_finished(run)):
        step = measure_step(ModelConfig(**SIZES, vocab_size=257), BATCH)
        minutes = math.ceil(left * step.seconds / 60)
        practice = ", some 3 min for practice on two cores" if config.reward else ""
        terminal.say(
            f"about {minutes} min for {left:,} training steps here{practice}, and a minute for the "
            "rest"
        )
    for i, (title, run, words) in enumerate(stages, 1):
        console.rule(f"{i}  {title}")
        if code := _run_stage(run, words):
            return code
    last = practised if config.reward else tuned
    console.rule(f"{len(stages) + 1}  chatting")
    _talk(Run.open(last))
    console.rule("before and after training")
    _summary(Run.open(base), console)
    before, after = _scores(base), _scores(tuned)
    console.print(skills.tables({**before, **after}))
    if config.reward:
        console.rule("before and after practice")
        _learning_curve(Run.open(practised), console)
        console.print(skills.tables(_scores(practised), before=after))
    described = ", ".join(map(str, [base, tuned, *([practised] if config.reward else [])]))
    terminal.say(f"""
report.md, curves.png and samples.txt in {described} describe the training. Next:

  gptsmith serve {last}      # the chat page: open http://127.0.0.1:8000 in a browser
  gptsmith chat {last}
  gptsmith generate {base} --prompt "Return a list of" --num-samples 3
  gptsmith inspect {corpus}
  gptsmith prepare YOUR_TEXT.txt --tokenizer bpe --out data/mine
  gptsmith plan --data data/mine --time 15m --out mine.yaml
  gptsmith pretrain mine.yaml --out runs/mine
""")
    return 0


SIZES = {"n_layer": 4, "n_embd": 192, "n_head": 4, "context_length": 256}
BATCH = 8  # rows
# A model of this size learns fastest with these (docs/log.md).
LEARNING = (
    "--optim.schedule", "linear", "--optim.learning-rate", "0.005",
    "--optim.momentum", "0.9", "--optim.embedding-lr-scale", "2",
)  # fmt: skip
# Practice on questions with arguments of training: none is held out.
PRACTICE = (
    "--prompts-per-step", "64", "--group-size", "8", "--max-new-tokens", "80",
    "--credit", "prefix", "--optim.learning-rate", "0.0005", "--optim.schedule", "linear",
    "--eval.interval", "50", "--val-prompts", "400",
)  # fmt: skip


def _flag(name: str) -> str:
    return f"--model.{name.replace('_', '-')}"


def _scoring(run: Path, config: DemoConfig) -> list[str | Path]:
    per_skill = str(config.per_skill)
    return ["evaluate", run, "--tasks", "skills", "--per-skill", per_skill, "--out", run / SKILLS]


def _scores(run: Path) -> dict[str, Scores]:
    """What the evaluation left in the run's folder."""
    found: dict[str, Scores] = files.read_json(run / SKILLS)["skills"]["by_skill"]
    return found


def _learning_curve(run: Run, console: Console) -> None:
    """The share of held-out questions that the model answers right, as practice goes on."""
    table = Table("step", "right", "")
    for event in read_events(run.metrics):
        if event["event"] == "val":
            right = event["val_reward"]
            table.add_row(f"{event['step']:,}", f"{right:.1%}", "█" * round(40 * right))
    console.print(table)


def _is_finished(run: Path) -> bool:
    return (run / layout.WEIGHTS).is_file()


def _run_stage(run: Path | None, words: Sequence[str | Path]) -> int:
    """Print a command as a user would type it, and run it.

    run: the run that it trains, if any; skipped if it is finished, resumed if it was interrupted.
    """
    from gptsmith.train import checkpoint

    if run is not None:
        if _is_finished(run):
            terminal.say(f"{run} is finished already")
            return 0
        words = [*words, "--resume"] if checkpoint.steps(run / layout.CHECKPOINTS) else words
    verb, *argv = [str(word) for word in words]
    terminal.say(f"$ gptsmith {verb} {shlex.join(argv)}")
    if verb == "pretrain":  # its clock starts now, not when the demo started
        return pretrain.main(argv, time.perf_counter())
    if verb == "finetune":
        return finetune.main(argv, time.perf_counter())
    commands = {"prepare": prepare.main, "generate": generate.main, "evaluate": evaluate.main}
    return commands[verb](argv) or 0


def _talk(run: Run) -> None:
    """Short conversations with scripted user messages, decoded greedily: the same every time."""
    from gptsmith.generate.chat import Chat

    assert run.chat_template is not None
    chat = Chat(run.load_model(), run.tokenizer, run.chat_template)
    greedy = SamplingConfig(temperature=0, max_new_tokens=80)
    terminal.say(f"$ gptsmith chat {run.path} --temperature 0")
    for questions in CONVERSATIONS:
        messages: list[Message] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = chat.reply(messages, greedy).text
            messages.append({"role": "assistant", "content": answer})
            terminal.say(f"> {question}\n{answer}")
        terminal.say()


def _summary(run: Run, console: Console) -> None:
    """The same measurements and the same prompt, before training and after it."""
    from gptsmith.recipes.report import number

    events = read_events(run.metrics)
    table = Table(show_header=True, show_lines=True)
    for name in ("", "before", "after"):
        table.add_column(name, overflow="fold", ratio=None if not name else 1)
    val = [e for e in events if e["event"] == "val"]
    for name, digits in (("val_loss", 3), ("perplexity", 1), ("bits_per_byte", 2), ("top1", 3)):
        table.add_row(
            name.replace("_", " "), *(number(e[name], f".{digits}f") for e in (val[0], val[-1]))
        )
    samples = [e for e in events if e["event"] == "sample"]
    table.add_row("sample", *(e["title"] + e["text"] for e in (samples[0], samples[-1])))
    console.print(table)
