"""Chat tuning: a trained model and conversations in, a model that answers out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import Field

from gptsmith import files
from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template import CHAT_TOKENS, ChatTemplate, Message, chat_tokenizer
from gptsmith.data.chat import ChatCounts, encode_conversations, load_chat
from gptsmith.data.examples import Example, Examples
from gptsmith.data.options import ChatFiles
from gptsmith.data.report import ReadReport
from gptsmith.data.skills import skill_conversations
from gptsmith.recipes import finetune, options, sft
from gptsmith.recipes.sft import AnswersConfig
from gptsmith.tokenizer import Tokenizer

BUILT_IN = "skills"  # the set that needs no file
SHOWN = 3  # conversations answered at each evaluation


class ChatConfig(AnswersConfig, ChatFiles):
    """Tune a model on conversations."""

    data: tuple[str, ...] = Field(min_length=1)
    """Conversations: files, folders or patterns (.jsonl, .parquet, .arrow ...), what `gptsmith
    prepare --format chat` made, or `skills`, the built-in set. Repeatable."""
    val: tuple[str, ...] = ()
    """Conversations to validate on, repeatable (default: a share of the data)."""
    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the conversations to validate on, without --val."""
    template: Path | None = None
    """Chat template, a Jinja file (default: the model's own, else that of gptsmith)."""
    special_tokens: tuple[str, ...] = ()
    """Tokens that --template writes, one id each (`<|im_start|>`), repeatable (default: those of
    gptsmith for a model without a template, none for another)."""
    questions: int = Field(20_000, ge=1)
    """Conversations that are made of the built-in set."""


def main(argv: Sequence[str], started: float | None = None) -> int:
    """`gptsmith finetune chat [RECIPE.yaml] --from RUN --data FILE --out RUN2`."""
    return options.command("finetune chat", ChatConfig, chat, argv, started)


def chat(config: ChatConfig, started: float | None = None) -> int:
    """Tune as the config says; returns the exit code, 0 or loop.STOPPED."""
    source = finetune.origin(config)
    given = None if config.resume else read_template(config)
    own = source.template if given is None else given
    tokens = config.special_tokens or (CHAT_TOKENS if source.template is None else ())
    begin = finetune.start(config, source, tokens)
    try:
        tokenizer, template = chat_tokenizer(begin.tokenizer, own)
    except ValueError as error:
        if config.template is None or config.resume:
            raise
        raise ValueError(
            f"--template {config.template}: {error} (--special-tokens names those it writes)"
        ) from None
    T = finetune.row_length(config.context_length, begin)
    train, val, notes = load(config, template, tokenizer, T)
    asked = [first_question(example, template) for example in islice(val, SHOWN)]
    return sft.tune(
        config, source, begin, template, T, train, val, asked, notes,
        fixed=("template", "special_tokens", "questions"), started=started,
    )  # fmt: skip


def read_template(config: ChatConfig) -> str | None:
    """The text of --template. ValueError if it is none, or lacks a token that it shall write."""
    if config.template is None:
        if config.special_tokens:
            raise ValueError("--special-tokens are those of a --template of your own: give it too")
        return None
    if not config.template.is_file():
        raise ValueError(f"--template {config.template}: there is no such file")
    text = files.read_text(config.template)
    for name in config.special_tokens:
        if not name or name not in text or any(map(str.isspace, name)):
            raise ValueError(
                f"--special-tokens {name!r}: {config.template} does not write it as a token; give "
                "each of its tokens by a flag of its own"
            )
    return text


def load(
    config: ChatConfig, template: ChatTemplate, tokenizer: Tokenizer, T: int
) -> tuple[Examples, Examples, list[str]]:
    """Examples to train and to validate on, and what there is to say about them."""

    def read(sources: Sequence[str]) -> tuple[Examples, str]:
        if BUILT_IN in sources:
            if len(sources) > 1:
                raise ValueError(f"--data {BUILT_IN} is the built-in set: name it alone")
            template.check_prefix_preserving()  # load_chat does it for files
            counts = ChatCounts(T)
            made = skill_conversations(config.train.seed, config.questions)
            encoded = encode_conversations(made, template, ReadReport(), counts)
            return Examples(encoded), str(counts)
        examples, counts = load_chat(sources, config, template, tokenizer, T)
        return examples, str(counts)

    if BUILT_IN in config.val:
        raise ValueError(f"--val {BUILT_IN} would be what is trained on: leave it away")
    train, said = read(config.data)
    if config.val:
        val, also = read(config.val)
        said = f"{said}; to validate on: {also}"
    else:
        shares = 1 - config.val_fraction, config.val_fraction
        try:
            train, val = train.split(shares, config.train.seed)
        except ValueError as error:
            raise ValueError(f"{' '.join(config.data)}: {error}: give more, or --val") from None
    share = train.targets / max(1, train.tokens)
    sizes = (
        f"{len(train):,} conversations of {train.tokens:,} tokens to train on, {share:.0%} of them"
        f" the assistant's; {len(val):,} to validate on"
    )
    return train, val, [f"data: {said}", sizes]


def first_question(example: Example, template: ChatTemplate) -> list[int]:
    """The tokens of a conversation up to where its first answer begins."""
    probe = [Message(role=role, content=template.word()) for role in ("user", "assistant")]
    header = len(template.prompt(probe[:1])) - template.encode(probe).scored.index(True)
    answer = int(np.argmax(example.labels != IGNORE_INDEX))
    if example.ids[answer] != template.prompt(probe[:1])[-header]:  # it is not scored in this set
        return example.ids[:answer].tolist()
    return example.ids[: answer + header].tolist()
