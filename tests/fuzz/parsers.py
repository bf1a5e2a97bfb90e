"""What opens a stranger's files: each parser reads a folder, as a command would, to the end."""

from collections.abc import Callable
from pathlib import Path

import torch

TEXTS = ["", "a", "hello World, 1234!", "Ünïcode 🙂\u0301 \t\n x", "a" * 300, "日本語" * 20]


def template(folder: Path) -> None:
    from gptsmith.chat_template.template import CHAT_TOKENS, ChatTemplate, Message
    from gptsmith.tokenizer import Tokenizer

    text = (folder / "chat_template.jinja").read_bytes().decode()
    chat = ChatTemplate(text, Tokenizer.byte().add_special_tokens([*CHAT_TOKENS, "<|im_end|>"]))
    talk = [Message(role=role, content=f"{role} says") for role in ("user", "assistant") * 2]
    chat.encode(talk)
    chat.prompt(talk[:3])


def tokenizer(folder: Path) -> None:
    from gptsmith.tokenizer import Tokenizer

    found = Tokenizer.load(folder)
    for text in ["It was"] if found.kind == "char" else TEXTS:
        found.decode(found.encode(text, allow_special=True))
    found.decode(range(min(found.vocab_size, 500)))
    assert found.prompt("a") is not None
    lengths = found.token_bytes()
    assert lengths is None or len(lengths) == found.vocab_size
    found.add_special_tokens(["<|new|>"])


def rows(folder: Path) -> None:
    from gptsmith.data.rows import read_rows

    for _ in read_rows(next(folder.iterdir())):
        pass


def conversations(folder: Path) -> None:
    from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
    from gptsmith.data.chat import load_chat
    from gptsmith.data.examples import Examples
    from gptsmith.data.options import ChatFiles
    from gptsmith.tokenizer import Tokenizer

    grown = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
    path, template = next(folder.iterdir()), ChatTemplate(TEMPLATE, grown)
    if path.name == "chat.arrow":  # prepared, with a tokenizer that is not here
        for example in Examples(path):
            example.labels.sum()
    else:
        load_chat([path], ChatFiles(), template, 64)


def documents(folder: Path) -> None:
    from gptsmith.data.options import ReadOptions
    from gptsmith.data.report import ReadReport
    from gptsmith.data.sources import open_source
    from gptsmith.tokenizer import Tokenizer

    report = ReadReport()
    source = open_source(str(next(folder.iterdir())), ReadOptions(), report)
    tokens, ids = Tokenizer.byte().special_ids.document, source.token_ids
    found = source.documents() if ids is None else ids.documents(tokens, 257, report)
    for document in found:
        for _ in document.chunks:
            pass


def corpus(folder: Path) -> None:
    from gptsmith.data.shards import Corpus

    found = Corpus.open(folder)
    assert found.tokenizer is not None
    for array in (*found.train, *found.val):
        array.sum()


def model(folder: Path) -> None:
    from gptsmith.interop.sources import open_source

    names = {path.name for path in folder.iterdir()}
    found = open_source(str(folder / "ckpt.pt" if "ckpt.pt" in names else folder))
    for _, tensor in found.tensors():
        tensor.float().sum()


def adapter(folder: Path) -> None:
    from gptsmith.interop import peft
    from gptsmith.run.layout import read_architecture

    peft.load(folder / "adapter", read_architecture(folder / "model.json"))


def run(folder: Path) -> None:
    from gptsmith.run import Run

    found = Run.open(folder)
    model = found.load_model()
    assert found.tokenizer is not None
    assert found.stage
    _ = found.chat_template
    with torch.no_grad():
        model.hidden(torch.zeros(1, 4, dtype=torch.long))


def recipe(folder: Path) -> None:
    from gptsmith.config import load_config
    from gptsmith.recipes.options import PretrainConfig

    load_config(PretrainConfig, [str(folder / "recipe.yaml")], prog="x")


PARSERS: dict[str, Callable[[Path], None]] = {
    f.__name__: f
    for f in (
        template, tokenizer, rows, conversations, documents, corpus, model, adapter, run, recipe
    )
}  # fmt: skip
