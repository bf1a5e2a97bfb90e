"""`gptsmith chat RUN`: talk with a tuned model in the terminal, or through pipes."""

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pydantic import Field

from gptsmith import files
from gptsmith.chat_template import Message
from gptsmith.config import load_config
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.run import Run
from gptsmith.run.options import WeightOptions

HELP = """\
/reset           begin a new conversation
/system TEXT     what the model should know or how it should behave; without TEXT, nothing
/temperature X   0 always takes the likeliest word, 1 draws as the model has learned
/save FILE       add the conversation to FILE, JSON lines as `gptsmith finetune chat` reads them
/help            this list
/quit            end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one. A message that begins
with / is written with a space before it."""

# What a model must not do to a terminal; line ends and tabs are harmless.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ChatOptions(SamplingConfig, WeightOptions):
    """Which model, and how it draws its answers."""

    temperature: float = Field(0.6, ge=0)
    """Divides the logits: below 1 sharper, above 1 wilder, 0 always takes the likeliest token."""
    system: str | None = None
    """What the model should know or how it should behave."""


def main(argv: list[str]) -> None:
    options = load_config(
        ChatOptions,
        argv,
        prog="gptsmith chat",
        description="Talk with a model that was tuned for it; /help lists what can be typed.",
        positional="run",
    )
    run = Run.open(options.run)
    if run.model_config.labels:
        raise ValueError(f"{run.path} is a classifier: gptsmith classify {run.path} asks it")
    if run.chat_template is None:
        raise ValueError(
            f"{run.path} was not tuned for talking: make a chat model of it with gptsmith finetune "
            f"chat --from {run.path} --data FILE --out RUN2"
        )
    session = Session(Chat(options.load(run), run.tokenizer, run.chat_template), options)
    if options.system is not None:
        session.instruct(options.system)
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"Talking with {run.path}. /help lists the commands, /quit ends.")
        session.talk()
    else:
        while (text := _read("")) is not None:
            if text.strip() and not session.take(text):
                break


class Session:
    """A conversation with a model. All of it is kept, although the model reads what fits."""

    def __init__(self, chat: Chat, sampling: SamplingConfig) -> None:
        self.chat = chat
        self.sampling = sampling
        self.messages: list[Message] = []
        self.unread = 0  # messages that no longer fit
        self.live = False  # whether pieces are shown as they come

    def talk(self) -> None:
        """Until the end of the input or /quit; mistakes and Ctrl-C only cost the line."""
        with suppress(ImportError):  # editing and history of lines
            import readline  # noqa: F401
        self.live = True
        text: str | None = ""
        while text is not None:
            try:
                text = _read("> ")
                if text and text.strip() and not self.take(text):
                    return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D ends")
            except (ValueError, OSError) as error:
                _remark(str(error))
        print()

    def take(self, text: str) -> bool:
        """A command or a message; False after /quit. ValueError or OSError for a mistake."""
        if not text.startswith("/"):
            self.answer(text)
            return True
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        match command:
            case "/quit":
                return False
            case "/help":
                print(HELP)
            case "/reset":
                self.messages = [m for m in self.messages if m["role"] == "system"]
                self.unread = 0
                _remark("a new conversation")
            case "/system":
                self.instruct(rest)
                _remark("said to the model" if rest else "the model is told nothing")
            case "/temperature":
                self.set_temperature(rest)
                _remark(f"temperature {self.sampling.temperature:g}")
            case "/save":
                _remark(f"{save(rest, self.messages)} in {rest}")
            case _:
                raise ValueError(f"there is no {command}: /help lists the commands")
        return True

    def instruct(self, text: str) -> None:
        """Change the system message; what was said stays."""
        said = [message for message in self.messages if message["role"] != "system"]
        system = [Message(role="system", content=text)] if text else []
        # Not every template accepts a system message: find out now.
        self.chat.template.prompt([*system, Message(role="user", content=text)])
        self.messages = system + said

    def set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf"):
            raise ValueError(f"/temperature wants a number from 0 up, not {text!r}")
        self.sampling = self.sampling.model_copy(update={"temperature": value})

    def answer(self, text: str) -> None:
        """Ask the model, show what it says, and remember both."""
        asked = [*self.messages, Message(role="user", content=text)]
        prompt = self.chat.encode(asked, self.sampling)
        if len(asked) - len(prompt.messages) > self.unread:
            self.unread = len(asked) - len(prompt.messages)
            context = self.chat.engine.model.config.context_length
            _remark(
                f"the oldest {self.unread} messages no longer fit into the model's context of "
                f"{context} tokens"
            )
        turn = sum(message["role"] == "user" for message in self.messages)
        sampling = self.sampling.with_seed(self.sampling.seed + turn)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if self.live:
                print(_CONTROL.sub("\ufffd", piece), end="", flush=True)

        with _one_interrupt():
            stopped, length = False, 0
            try:
                generation = self.chat.reply(prompt, sampling, show)
                length = len(generation.ids) if generation.finish_reason == "length" else 0
            except KeyboardInterrupt:
                if not self.live:
                    raise
                stopped = True
            said = "".join(pieces)
            if said or not stopped:
                self.messages = [*asked, Message(role="assistant", content=said)]
            print("" if self.live else said, flush=True)
            if stopped:
                _remark("stopped" if said else "stopped; your message is forgotten")
            elif length:
                _remark(f"cut after {length} tokens")


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once; those of an impatient finger after it do nothing."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def save(name: str, messages: list[Message]) -> str:
    """Add the conversation to a file of conversations, in the place of its own beginning if that
    was saved there before. Returns what was done. ValueError or OSError if it cannot be."""
    if not name:
        raise ValueError("/save wants the name of a file")
    messages = _answered(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("nothing was said yet that could be saved")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~somebody
        raise ValueError(f"{name}: {error}") from None
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    others = path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.exists() else []
    for number, line in enumerate(others[:], start=1):
        try:
            saved = json.loads(line)["messages"]
            if saved == messages[: len(saved)]:
                others.remove(line)
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path} holds something else than conversations (line {number}): take another name"
            ) from None
    new = json.dumps({"messages": messages}, ensure_ascii=False)
    files.write_text(path, "".join(f"{line}\n" for line in [*others, new]))
    return f"{len(messages)} messages saved, conversation {len(others) + 1}"


def _answered(messages: list[Message]) -> list[Message]:
    """Without the questions that got no word: a model is not to learn silence from them."""
    kept: list[Message] = []
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            kept.pop()
        else:
            kept.append(message)
    return kept


def _read(prompt: str) -> str | None:
    """A message, its lines joined where they end with a backslash; None at the end of the input."""
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


def _remark(text: str) -> None:
    """To the person, not to whoever reads the answers."""
    print(f"({text})", file=sys.stderr, flush=True)
