"""`gptsmith chat RUN`: talk to a chat model in the terminal, or through pipes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pydantic import Field

from gptsmith import files, terminal
from gptsmith.chat_template.template import Message
from gptsmith.commands.text_options import TextOptions
from gptsmith.config import load_config
from gptsmith.generate.options import SamplingConfig

if TYPE_CHECKING:
    from gptsmith.generate.chat import Chat

HELP = """\
/reset           start a new conversation
/system TEXT     set the system message; without TEXT, remove it
/temperature X   0 is greedy decoding, 1 samples from the model's own distribution
/save FILE       add the conversation to FILE, in JSON lines for `gptsmith finetune chat`
/help            show this list
/quit            exit, like Ctrl-D
Ctrl-C stops a reply. End a line with \\ to continue the message on the next line. Put a space
before a message that starts with /."""


class ChatOptions(TextOptions):
    """Talk to a chat model; /help lists the commands."""

    temperature: float = Field(0.6, ge=0)
    """Divides the logits: lower is more predictable, higher more varied, 0 is greedy decoding."""
    system: str | None = None
    """The system message: what the model should know, or how it should behave."""


def main(argv: list[str]) -> None:
    options = load_config(ChatOptions, argv, prog="gptsmith chat", positional="run")
    from gptsmith.generate.chat import Chat  # imports torch: not before help and option errors
    from gptsmith.run import Run

    run = Run.open(options.run)
    if run.model_config.labels:
        raise ValueError(f"{run.path} is a classifier: use gptsmith classify {run.path}")
    if run.chat_template is None:
        raise ValueError(
            f"{run.path} is not a chat model: make one from it with gptsmith finetune chat "
            f"--from {run.path} --data FILE --out RUN2"
        )
    model = options.load(run)
    engine = options.engine(run, model)
    session = Session(Chat(model, run.tokenizer, run.chat_template, engine), options)
    if options.system is not None:
        session.set_system_message(options.system)
    if sys.stdin.isatty() and sys.stdout.isatty():
        terminal.say(f"Talking to {run.path}. /help lists the commands, /quit exits.")
        session.run()
    else:
        while (text := _read("")) is not None:
            if text.strip() and not session.handle(text):
                break


class Session:
    """A conversation with a model. It is kept as a whole, even if the model reads only a part."""

    def __init__(self, chat: Chat, sampling: SamplingConfig) -> None:
        self.chat = chat
        self.sampling = sampling
        self.messages: list[Message] = []
        self.dropped = 0  # oldest messages that no longer fit into the context
        self.interactive = False  # print replies while they are generated

    def run(self) -> None:
        """Read lines until the end of input or /quit; errors and Ctrl-C cost only the line."""
        with suppress(ImportError):  # line editing and history
            import readline  # noqa: F401
        self.interactive = True
        text: str | None = ""
        while text is not None:
            try:
                text = _read("> ")
                if text and text.strip() and not self.handle(text):
                    return
            except KeyboardInterrupt:
                terminal.say("\n/quit or Ctrl-D exits")
            except (ValueError, OSError) as error:
                _note(str(error))
        terminal.say()

    def handle(self, text: str) -> bool:
        """Run a command or reply to a message; False after /quit. ValueError or OSError for user
        errors."""
        if not text.startswith("/"):
            self.reply(text)
            return True
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        match command:
            case "/quit":
                return False
            case "/help":
                terminal.say(HELP)
            case "/reset":
                self.messages = [m for m in self.messages if m["role"] == "system"]
                self.dropped = 0
                _note("new conversation")
            case "/system":
                self.set_system_message(rest)
                _note("system message set" if rest else "system message removed")
            case "/temperature":
                self.set_temperature(rest)
                _note(f"temperature {self.sampling.temperature:g}")
            case "/save":
                _note(f"{save(rest, self.messages)} in {rest}")
            case _:
                raise ValueError(f"unknown command {command}: /help lists the commands")
        return True

    def set_system_message(self, text: str) -> None:
        """Change the system message; the other messages stay."""
        others = [message for message in self.messages if message["role"] != "system"]
        system = [Message(role="system", content=text)] if text else []
        # Not every template accepts a system message: fail now, not at the next reply.
        self.chat.template.prompt([*system, Message(role="user", content=text)])
        self.messages = system + others

    def set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf"):
            raise ValueError(f"/temperature needs a number of at least 0, got {text!r}")
        self.sampling = self.sampling.model_copy(update={"temperature": value})

    def reply(self, text: str) -> None:
        """Print the model's reply to a message, and add both to the conversation."""
        asked = [*self.messages, Message(role="user", content=text)]
        prompt = self.chat.encode(asked, self.sampling)
        if len(asked) - len(prompt.messages) > self.dropped:
            self.dropped = len(asked) - len(prompt.messages)
            context = self.chat.engine.model.config.context_length
            _note(
                f"the oldest {self.dropped} messages no longer fit into the model's context of "
                f"{context} tokens"
            )
        turn = sum(message["role"] == "user" for message in self.messages)
        sampling = self.sampling.with_seed(self.sampling.seed + turn)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if self.interactive:
                terminal.write(piece, end="", flush=True)

        with _one_interrupt():
            stopped, length = False, 0
            try:
                generation = self.chat.reply(prompt, sampling, show)
                length = len(generation.ids) if generation.finish_reason == "length" else 0
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                stopped = True
            said = "".join(pieces)
            if said or not stopped:
                self.messages = [*asked, Message(role="assistant", content=said)]
            terminal.write("" if self.interactive else said, flush=True)
            if stopped:
                _note("stopped" if said else "stopped; your message is discarded")
            elif length:
                _note(f"cut after {length} tokens")


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once; repeated ones are ignored."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def save(name: str, messages: list[Message]) -> str:
    """Add the conversation to a file of conversations; it replaces its own earlier versions.

    Returns what was done. ValueError or OSError for a conversation or file that cannot be saved.
    """
    if not name:
        raise ValueError("/save needs a file name")
    messages = _without_empty_replies(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no reply yet: nothing to save")
    path = Path(os.path.expanduser(name))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    text = files.read_text(path).rstrip("\n") if path.exists() else ""
    others = text.split("\n") if text else []
    for number, line in enumerate(others[:], start=1):
        try:
            saved = json.loads(line)["messages"]
            if saved == messages[: len(saved)]:
                others.remove(line)
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: not a conversation; save to another file"
            ) from None
    new = json.dumps({"messages": messages}, ensure_ascii=False)
    files.write_text(path, "".join(f"{line}\n" for line in [*others, new]))
    return f"{terminal.counted(len(messages), 'message')} saved, conversation {len(others) + 1}"


def _without_empty_replies(messages: list[Message]) -> list[Message]:
    """The messages without turns with an empty reply, on which no model should be trained."""
    kept: list[Message] = []
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            kept.pop()
        else:
            kept.append(message)
    return kept


def _read(prompt: str) -> str | None:
    """A message; lines that end with a backslash continue on the next. None at the end of input."""
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            lines.append(input(". " if lines and prompt else prompt))
        except EOFError:
            if not lines:
                return None
            break
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 ({error.reason})") from None
    *above, last = lines
    return "\n".join([*(line[:-1] for line in above), last.removesuffix("\\")])


def _note(text: str) -> None:
    """Print a note on stderr, because stdout is for the replies."""
    terminal.note(f"({text})")
