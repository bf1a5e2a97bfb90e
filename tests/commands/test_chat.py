"""`gptsmith chat`: through pipes, in a real terminal, and interrupted there."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import BYTES, OURS

from gptsmith import cli
from gptsmith.chat_template.template import TEMPLATE, Message
from gptsmith.commands.chat import save
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run, layout
from gptsmith.run.create import open_for_training


def make_run(path: Path, context: int, template: str | None = TEMPLATE) -> Path:
    """A run whose model babbles in small letters and never ends by itself when it is greedy."""
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=context,
        vocab_size=BYTES.vocab_size, tie_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTModel(config)
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
        letters = torch.zeros(config.vocab_size, 1)
        letters[ord("a") : ord("z") + 1] = 1
        model.head_weight.mul_(letters)
    with open_for_training(path, {"stage": "test"}, config, BYTES, template=template) as run:
        run.write_weights(layout.WEIGHTS, model.state_dict())
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("chat") / "run", 64)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("chat") / "long", 50_000)


def pipe(text: str, *argv: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "gptsmith", "chat", *map(str, argv)]
    return subprocess.run(words, input=text, capture_output=True, text=True)


def expected(run: Path, messages: list[Message], **sampling: Any) -> str:
    opened = Run.open(run)
    config = SamplingConfig(**{"temperature": 0.6, **sampling})
    assert opened.chat_template is not None
    chat = Chat(opened.load_model(), opened.tokenizer, opened.chat_template)
    return chat.reply(messages, config).text


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def test_piped_lines_are_one_conversation(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    done = pipe(
        f"Hello\n\nTwo\\\nlines\n/save {file}\n/reset\nHello\n/save {file}\n/quit\nno more\n",
        run, "--max-new-tokens", 10, "--seed", 3, "--system", "Be",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    system = Message(role="system", content="Be")
    first = expected(run, [system, user("Hello")], max_new_tokens=10, seed=3)
    history = [system, user("Hello"), assistant(first), user("Two\nlines")]
    second = expected(run, history, max_new_tokens=10, seed=4)
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    assert first != second
    saved = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    # the second conversation is how the first began, but not the other way round
    assert saved == [[*history, assistant(second)], history[:3]]
    assert OURS.encode(saved[0]).ids  # what is saved can be learned
    assert "(cut after 10 tokens)" in done.stderr
    assert done.stderr.count("(the oldest ") == 0


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Types lines into the command, in this process: (exit code, output, errors)."""

    def say(run: Path, *lines: str, options: str = "") -> tuple[int, str, str]:
        left = iter(lines)

        def line(prompt: str) -> str:
            for text in left:
                return text
            raise EOFError

        monkeypatch.setattr("builtins.input", line)
        code = cli.main(["chat", str(run), "--max-new-tokens", "8", *options.split()])
        return code, *capsys.readouterr()

    return say


def test_truncated_history_is_reported(say, run: Path) -> None:
    lines = [f"Message number {i}" for i in range(6)]
    code, out, err = say(run, *lines)
    assert code == 0
    assert out.count("\n") == 6
    remarks = re.findall(r"the oldest (\d+) messages no longer fit .* context of 64 tokens", err)
    assert remarks == ["2", "4", "6", "8"]


def test_system_message_can_change(say, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    code, _, err = say(
        run, "/system Be brief", "Hi", f"/save {file}", "/system", "Ho", f"/save {file}"
    )
    assert code == 0, err
    with_system, without = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [m["role"] for m in with_system] == ["system", "user", "assistant"]
    assert without[:2] == with_system[1:]
    assert [m["role"] for m in without] == ["user", "assistant"] * 2


def test_temperature(say, run: Path) -> None:
    greedy = say(run, "Hi", options="--temperature 0")
    assert say(run, "/temperature 0", "Hi")[:2] == greedy[:2]
    assert say(run, "Hi", options="--temperature 9")[1] != greedy[1]


def test_saving_again_replaces_the_earlier_part(say, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    assert say(run, "Hi", f"/save {file}", "Ho", f"/save {file}")[0] == 0
    assert say(run, "Other", f"/save {file}")[0] == 0
    lengths = [len(json.loads(line)["messages"]) for line in file.read_text().splitlines()]
    assert lengths == [4, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature hot", "/temperature needs a number of at least 0, got 'hot'"),
        ("/temperature nan", "/temperature needs a number of at least 0, got 'nan'"),
        ("/tempo 1", "unknown command /tempo: /help lists the commands"),
        ("/save", "/save needs a file name"),
        ("/save x.jsonl", "no reply yet"),
        ("x" * 100, "tokens, including what the template adds, but only 56 fit: shorten it"),
    ],
)
def test_an_error_ends_piped_input(say, run: Path, line: str, message: str) -> None:
    code, out, err = say(run, line, "Hi")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_save_rejects_files_without_conversations(say, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("my notes\n")
    code, _, err = say(run, "Hi", f"/save {file}")
    assert code == 2
    assert "notes.txt, line 1: not a conversation; save to another file" in err
    assert file.read_text() == "my notes\n"
    code, _, err = say(run, "Hi", f"/save {tmp_path}/nowhere/x.jsonl")
    assert code == 2
    assert f"{tmp_path}/nowhere: no such folder" in err


def test_save_into_an_empty_file_and_one_that_is_no_text(say, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert say(run, "Hi", f"/save {tmp_path}/empty.jsonl")[0] == 0
    assert len((tmp_path / "empty.jsonl").read_text().splitlines()) == 1
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    code, _, err = say(run, "Hi", f"/save {tmp_path}/photo.jpg")
    assert code == 2
    assert "photo.jpg, byte 0: not UTF-8" in err


def test_save_omits_empty_replies(tmp_path: Path) -> None:
    said = [("user", "a"), ("assistant", " \n"), ("user", "b"), ("assistant", "c")]
    messages = [Message(role=role, content=text) for role, text in said]
    save(str(tmp_path / "x.jsonl"), messages)
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"messages": messages[2:]}
    with pytest.raises(ValueError, match="no reply yet"):
        save(str(tmp_path / "x.jsonl"), messages[:2])
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name: no such folder"):
        save("~nobody-of-this-name/x.jsonl", messages)


def test_base_model_is_rejected(say, tmp_path: Path) -> None:
    code, out, err = say(make_run(tmp_path / "base", 32, template=None), "Hi")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is not a chat model: make one from it with gptsmith finetune chat" in err


def test_a_template_without_system_messages(say, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}"
        "{% endif %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    path = make_run(tmp_path / "run", 64, source)
    assert say(path, "Hi")[0] == 0
    code, _, err = say(path, "Hi", options="--system Be")
    assert code == 2
    assert "the chat template rejects this conversation: No system role" in err


# In a terminal

CHILD = (  # makes the pseudo-terminal the one whose Ctrl-C is ours
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "from gptsmith import cli; sys.exit(cli.main())"
)


class Terminal:
    """A process in a pseudo-terminal, and what it has shown."""

    def __init__(self, *argv: object) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, "chat", *map(str, argv)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""
        self.seen = 0

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def read(self, pattern: str, limit: float = 20) -> str:
        """What comes up to and with the pattern."""
        end = time.monotonic() + limit
        while not (found := re.compile(pattern, re.DOTALL).search(self.shown, self.seen)):
            readable, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            assert readable, self.shown
            try:
                piece = os.read(self.ours, 1000)
            except OSError:  # Linux says EIO where the other side has closed
                piece = b""
            assert piece, self.shown
            self.shown += piece.decode().replace("\r", "")
        self.seen = found.end()
        return found[0]

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_ctrl_c_stops_the_reply_but_not_the_program(long_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    with Terminal(long_run, "--max-new-tokens", 49_000, "--temperature", 0) as terminal:
        terminal.read("Talking to .*> ")
        terminal.type("Hi\n")
        terminal.read("Hi\n[a-z]{5}")
        # Not typed: the second of two typed ones may come late, and interrupt what is typed next.
        for _ in range(2):
            terminal.process.send_signal(signal.SIGINT)
        terminal.read(r"\(stopped\)\n.*> ")
        terminal.type(f"/save {file}\n")
        terminal.read(r"2 messages saved.*> ")
        [line] = file.read_text().splitlines()
        said = json.loads(line)["messages"][1]
        assert said["role"] == "assistant"
        assert re.fullmatch("[a-z]{5,}", said["content"])
        assert len(said["content"]) < 49_000
        terminal.type("/nonsense\n")  # costs a line and no more
        terminal.read("unknown command /nonsense.*> ")
        terminal.type("one\\\n")
        terminal.read(r"\. ")
        terminal.type("two\n")
        terminal.read("two\n[a-z]{5}")
        terminal.type("\x03")
        terminal.read(r"\(stopped\)\n> ")
        terminal.type(f"/save {file}\n")
        terminal.read(r"4 messages saved.*> ")
        assert json.loads(file.read_text())["messages"][2] == user("one\ntwo")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0


def test_help_and_quit(run: Path) -> None:
    with Terminal(run, "--max-new-tokens", 5, "--temperature", 0) as terminal:
        terminal.type("/help\n")
        terminal.read("/save FILE.*> ")
        terminal.type("Hi\n")
        terminal.read(r"Hi\n[a-z]{5}\n\(cut after 5 tokens\)\n> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(20) == 0
