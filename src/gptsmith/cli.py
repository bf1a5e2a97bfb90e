"""The `gptsmith` command: verbs, exit codes, and errors in one line.

Only the standard library is imported here, and little of it: `gptsmith --help` must be instant.
Exit codes: 0 done, 2 wrong input, 75 stopped by a signal after saving (run again with --resume),
130 interrupted, 1 anything else.
"""

import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from gptsmith import __version__, terminal

# verb -> (module, one line of help). Its `main` takes the arguments after the verb and returns an
# exit code, or None for 0.
VERBS = {
    "demo": ("demo", "every stage on a small model: minutes, no network"),
    "prepare": ("commands.prepare", "make a tokenizer and token shards from text"),
    "plan": ("commands.plan", "what to train with a budget, what it takes and reaches"),
    "pretrain": ("commands.pretrain", "train a model from scratch on a corpus"),
    "finetune": (
        "commands.finetune",
        "fine-tune: text, chat, instruct, classify, preference, reward",
    ),
    "chat": ("commands.chat", "talk to a chat model"),
    "classify": ("commands.classify", "classify texts with a tuned model"),
    "evaluate": ("commands.evaluate", "measure a model: perplexity, tasks, responses"),
    "generate": ("commands.generate", "continue prompts with a trained model"),
    "serve": ("commands.serve", "chat page and OpenAI-compatible API"),
    "import": ("commands.import_model", "turn an external model into a run"),
    "export": ("commands.export", "convert a model for transformers or llama.cpp"),
    "inspect": ("commands.inspect", "show a corpus, a run, conversations or preferences"),
    "recipes": ("commands.recipes", "list the recipes that come with gptsmith, or print one"),
    "doctor": ("commands.doctor", "show what this machine can do, and what it lacks"),
}

# User errors: exit code 2. Every other exception is ours, or the machine's.
WRONG_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
WRONG_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    # OpenMP's threads spin while they wait for one another. On a machine with other work, a long
    # spin keeps the waited-for thread off the processor: training is then 7 times as slow. A short
    # one costs nothing measurable when the machine is quiet (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _replace_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in flags
    if debug:
        arguments.remove("--debug")
    verb = arguments[0] if arguments else "--help"
    try:
        if verb in ("-h", "--help", "help"):
            terminal.say(_help())
        elif verb in ("-V", "--version"):
            terminal.say(f"gptsmith {__version__}")
        elif verb not in VERBS:
            from gptsmith.flags import nearest

            near = nearest(verb, VERBS)
            hint = f"did you mean {near}?" if near else f"choose from {', '.join(VERBS)}"
            return _print_error(f"unknown verb {verb!r}: {hint}", "gptsmith", 2)
        else:
            return _run(verb, arguments[1:], debug)
        terminal.flush_output()
    except BrokenPipeError:  # the reader is gone: gptsmith ... | head
        terminal.discard_output()
        return 1
    except OSError as error:  # a full disk behind standard output
        return _print_error(_message(error), "gptsmith", 1)
    return 0


def _run(verb: str, arguments: list[str], debug: bool) -> int:
    prog = f"gptsmith {verb}"
    terminal.show_library_messages()
    try:
        module = import_module(f"gptsmith.{VERBS[verb][0]}")
        code: int = module.main(arguments) or 0
        terminal.flush_output()
        return code
    except SystemExit as end:  # argparse after --help, or a library
        if isinstance(end.code, str):
            return _print_error(_message(end), prog, 1)
        return end.code or 0
    except KeyboardInterrupt as error:
        return _print_error(_with_notes("interrupted", error), prog, 130)
    except BrokenPipeError:
        raise
    except BaseException as error:  # some libraries in Rust raise no Exception when they panic
        message = _message(error) if debug else _short(_message(error))
        if debug:
            import traceback

            terminal.note(traceback.format_exc().rstrip("\n"))
        if isinstance(error, WRONG_INPUT) or getattr(error, "errno", 0) in WRONG_NAMES:
            return _print_error(message, prog, 2)
        hint = "" if debug else " (run again with --debug for the traceback)"
        return _print_error(f"{type(error).__name__}: {message}{hint}", prog, 1)


def _help() -> str:
    lines = [
        "usage: gptsmith VERB ...        (gptsmith VERB --help shows its options)",
        "",
        *(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()),
        "",
        "  --version  --debug (full tracebacks)",
        "",
        "exit codes: 0 done, 2 wrong input, 75 stopped by a signal after saving (run again with",
        "--resume), 130 interrupted, 1 anything else",
    ]
    return "\n".join(lines)


def _message(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{terminal.visible(str(error.filename), keep='')}: {error.strerror}"
    elif hasattr(error, "errors") and callable(error.errors):  # pydantic's ValidationError
        problems = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        message = "; ".join(f"{at}: {text}" if at else text for at, text in problems)
    else:
        message = str(error)
    message = _with_notes(message, error)
    return re.sub(r"\s*\n\s*", " ", terminal.visible(message)).strip()


def _with_notes(message: str, error: BaseException) -> str:
    """The message, and what was added to the error on its way."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def _short(message: str) -> str:
    """At most about 300 characters: the beginning names the place, the end the remedy."""
    if len(message) <= 300:
        return message
    head, tail = message[:170], message[-100:]
    head, tail = head.rpartition(" ")[0] or head, tail.partition(" ")[2] or tail
    return f"{head} [... --debug shows all ...] {tail}"


def _print_error(message: str, prog: str, code: int) -> int:
    terminal.note(f"{prog}: {message}")
    try:
        terminal.flush_output()
    except OSError:  # a full disk: Python would try again at its end, and change the exit code
        terminal.discard_output()
    return code


def _replace_closed_streams() -> None:
    """Replace standard streams that the parent process closed (`>&-`) by the null device. Otherwise
    the next file to be opened gets the free descriptor, and a library's output goes into it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the end
