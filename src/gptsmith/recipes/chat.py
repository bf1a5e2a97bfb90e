"""Fine-tune a model on conversations, which makes it a chat model."""

from __future__ import annotations

from itertools import islice

import numpy as np

from gptsmith import files
from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import CHAT_TOKENS, ChatTemplate, Message, tuning_template
from gptsmith.data.chat import ChatCounts, check_any_target, encode_conversations, load_chat
from gptsmith.data.examples import Example, Examples
from gptsmith.data.skills import skill_conversations
from gptsmith.recipes import finetune
from gptsmith.recipes.finetune import SFTData
from gptsmith.recipes.options import ChatConfig
from gptsmith.recipes.plan import Note

NUM_PROMPTS = 3  # validation conversations to answer at each evaluation


def chat(config: ChatConfig, started: float | None = None) -> int:
    """`gptsmith finetune chat`; returns the exit code, 0 or loop.STOPPED."""
    base = finetune.base_run(config)
    if config.resume and "windows" not in base.config:  # begun before there were windows
        config = config.model_copy(update={"windows": False})
    own_template = None if config.resume else read_template(config)
    source = base.template if own_template is None else own_template
    tokens = config.special_tokens or (CHAT_TOKENS if base.template is None else ())
    prepared = finetune.prepare(config, base, tokens)
    try:
        template = tuning_template(prepared.tokenizer, source)
    except ValueError as error:
        if config.template is None or config.resume:
            raise
        raise ValueError(
            f"--template {config.template}: {error} (--special-tokens declares special tokens)"
        ) from None
    T = finetune.row_length(config.context_length, prepared)
    train, val, notes = load(config, template, T)
    prompts = [first_prompt(example, template) for example in islice(val, NUM_PROMPTS)]
    prompts = [ids for ids in prompts if ids]  # before a greeting there may be nothing
    return finetune.train_on_examples(
        config, prepared, template, T, SFTData(train, val, prompts, notes),
        fixed=("template", "special_tokens", "questions"), started=started,
    )  # fmt: skip


def read_template(config: ChatConfig) -> str | None:
    """The text of --template; ValueError if it does not contain the --special-tokens."""
    if config.template is None:
        if config.special_tokens:
            raise ValueError("--special-tokens declares the tokens of --template: give both")
        return None
    if not config.template.is_file():
        raise ValueError(f"--template {config.template}: there is no such file")
    text = files.read_text(config.template)
    for name in config.special_tokens:
        if not name or name not in text or any(map(str.isspace, name)):
            raise ValueError(
                f"--special-tokens {name!r}: {config.template} does not contain this token; repeat "
                "the flag for each token"
            )
    return text


def load(
    config: ChatConfig, template: ChatTemplate, T: int
) -> tuple[Examples, Examples, list[Note]]:
    """Training examples, validation examples, and notes on them."""
    if finetune.uses_built_in(config):
        template.check_prefix_preserving()  # load_chat does it for files
        counts = ChatCounts(T, divide=config.windows)
        conversations = skill_conversations(config.train.seed, config.questions)
        train = Examples(encode_conversations(conversations, template, counts))
        check_any_target("--data skills", counts)
    else:
        train, counts = load_chat(config.data, config, template, T)
    summary = str(counts)
    if config.val:
        val, counts = load_chat(config.val, config, template, T)
        summary = f"{summary}; for validation: {counts}"
    else:
        shares = 1 - config.val_fraction, config.val_fraction
        try:
            train, val = train.split(shares, config.train.seed)
        except ValueError as error:
            where = f"{' '.join(config.data)}: {summary}"
            raise ValueError(f"{where}; {error}: give more, or --val") from None
    share = train.targets / max(1, train.tokens)
    sizes = (
        f"{len(train):,} training examples of {train.tokens:,} tokens, {share:.0%} of them"
        f" the assistant's; {len(val):,} for validation"
    )
    return train, val, [Note("data", summary), Note("data", sizes)]


def first_prompt(example: Example, template: ChatTemplate) -> list[int]:
    """The tokens of a conversation up to the beginning of its first answer."""
    probe = [Message(role=role, content=template.word()) for role in ("user", "assistant")]
    header = len(template.prompt(probe[:1])) - template.encode(probe).is_target.index(True)
    answer = int(np.argmax(example.labels != IGNORE_INDEX))
    if example.ids[answer] != template.prompt(probe[:1])[-header]:  # the header is not a target
        return example.ids[:answer].tolist()
    return example.ids[: answer + header].tolist()
