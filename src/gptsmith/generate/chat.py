"""Answers of a chat model: to one message, to a history, to many conversations at once.

An answer ends with the template's end token, the end of the text, or any other special token: what
the model writes after that (another turn, for example) is no part of what the assistant says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gptsmith.chat_template import TEMPLATE, ChatTemplate, Message
from gptsmith.generate.engine import Generation, generate
from gptsmith.generate.sampling import SamplingConfig

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel
    from gptsmith.tokenizer import Tokenizer

OnText = Callable[[str], None]

BATCH = 32  # conversations that are answered at the same time


def generate_chat_response(
    model: GPTModel,
    tokenizer: Tokenizer,
    message: str,
    system: str | None = None,
    template: str | None = None,
    config: SamplingConfig | None = None,
    on_text: OnText | None = None,
) -> str:
    """The assistant's answer to one message of a user. The rest as generate_multi_turn_response."""
    messages = [Message(role="user", content=message)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    return generate_multi_turn_response(model, tokenizer, messages, template, config, on_text)


def generate_multi_turn_response(
    model: GPTModel,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    config: SamplingConfig | None = None,
    on_text: OnText | None = None,
) -> str:
    """The assistant's next message, text only.

    messages: `{"role": ..., "content": ...}`, the user's last. The oldest turns are left out when
    they do not fit into the model's context together with the answer. template: that of the run
    (`run.template`; default: gptsmith's own). on_text gets the pieces as they come.
    ValueError for what is no conversation, and a last message that does not fit.
    """
    chat = ChatTemplate(template or TEMPLATE, tokenizer)
    config = config or SamplingConfig()
    fitting = fit_history(model, chat, messages, config)
    return reply(model, tokenizer, chat, fitting, config, on_text).text


def fit_history(
    model: GPTModel, template: ChatTemplate, messages: Sequence[Message], config: SamplingConfig
) -> list[Message]:
    """The newest turns, as many as leave room for an answer of max_new_tokens, or for half the
    context where that is less. ValueError if the last message alone is too long."""
    context = model.config.context_length
    return template.fit(messages, max(context - config.max_new_tokens, context // 2))


def reply(
    model: GPTModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    config: SamplingConfig,
    on_text: OnText | None = None,
) -> Generation:
    """The answer to a history that fits. It ends, at the latest, where the context does."""
    prompt = template.prompt(messages)
    most = min(config.max_new_tokens, model.config.context_length - len(prompt))
    [generation] = generate(
        model,
        [prompt],
        config.model_copy(update={"max_new_tokens": most}),
        tokenizer=tokenizer,
        stop_ids=_stops(tokenizer, template),
        on_token=None if on_text is None else lambda _, piece: on_text(piece),
    )
    return generation


def answers(
    model: GPTModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    config: SamplingConfig,
) -> list[str]:
    """The text of `replies`."""
    return [g.text for g in replies(model, tokenizer, template, conversations, config)]


def replies(
    model: GPTModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    config: SamplingConfig,
) -> list[Generation]:
    """What `reply` gives to each conversation, in their order, made many at a time.

    Conversations that are too long lose their oldest turns. Number i has the seed config.seed + i.
    """
    prompts = [template.prompt(fit_history(model, template, m, config)) for m in conversations]
    return complete(model, tokenizer, template, prompts, config)


def complete(
    model: GPTModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
) -> list[Generation]:
    """`replies` to prompts that are token ids already and shorter than the context: an answer ends,
    at the latest, where the context does."""
    context = model.config.context_length
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    found: dict[int, Generation] = {}
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        most = min(config.max_new_tokens, context - len(prompts[chunk[0]]))
        made = generate(
            model,
            [prompts[i] for i in chunk],
            config.model_copy(update={"max_new_tokens": max(1, most)}),
            tokenizer=tokenizer,
            stop_ids=_stops(tokenizer, template),
            seeds=[config.seed + i for i in chunk],
        )
        for i, generation in zip(chunk, made, strict=True):
            room = context - len(prompts[i])
            if len(generation.ids) >= room:  # it went on, as a shorter prompt had more room
                ids = generation.ids[:room]
                generation = replace(
                    generation, ids=ids, text=tokenizer.decode(ids), finish="length", forgotten=0
                )
            found[i] = generation
    return [found[i] for i in range(len(prompts))]


def _stops(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    return [*template.stop_ids, *tokenizer.special_tokens.values()]
