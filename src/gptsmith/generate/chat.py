"""Replies of a chat model: to one conversation, and to many at once.

A reply ends with the template's end token, the end of the text, or any other special token except
that of unknown text: what follows it (another turn, for example) is not part of the assistant's
message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptsmith.arguments import check_several
from gptsmith.chat_template.template import ChatPrompt, ChatTemplate, Message
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import DEFAULT_SAMPLING, SamplingConfig
from gptsmith.generate.request import Generation, OnText, Request

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel
    from gptsmith.tokenizer import Tokenizer


def reply_stop_ids(template: ChatTemplate) -> tuple[int, ...]:
    """The ids that end a reply."""
    return (*template.stop_ids, *template.tokenizer.special_ids.control)


class Chat:
    """A conversation partner: a chat model with its template.

        chat = Chat(model, tokenizer, run.chat_template)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        print(chat.reply(messages).text)

    Keep it for a whole conversation: the engine caches the tokens that the next turn has in common
    with the last one.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        engine: Engine | None = None,
    ) -> None:
        """engine: the model's; default: a new one."""
        self.engine = engine or Engine(model, tokenizer)
        self.template = template
        self._context_length = model.config.context_length
        self._stop_ids = reply_stop_ids(template)

    def __repr__(self) -> str:
        return f"Chat({self.engine!r})"

    def encode(
        self, messages: Sequence[Message], sampling: SamplingConfig = DEFAULT_SAMPLING
    ) -> ChatPrompt:
        """The prompt for a reply to the newest turns that leave room for max_new_tokens, or for
        half the context if that is less. ValueError if the last message alone is too long."""
        check_several(messages, "messages")
        room = max(self._context_length - sampling.max_new_tokens, self._context_length // 2)
        return self.template.truncate(messages, room)

    def reply(
        self,
        conversation: Sequence[Message] | ChatPrompt,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        on_text: OnText | None = None,
    ) -> Generation:
        """The assistant's next message; it ends, at the latest, where the model's context ends.

        conversation: messages, the last of which is the user's, or a prompt from `encode`. on_text:
        called with each piece of the text as it is generated. ValueError for an invalid
        conversation, and for a last message that is too long.
        """
        if not isinstance(conversation, ChatPrompt):
            conversation = self.encode(conversation, sampling)
        generation = self.engine.add(
            Request(
                conversation.ids,
                sampling,
                stop_ids=self._stop_ids,
                on_text=on_text,
                context_shift=False,
            )
        )
        try:
            for _ in self.engine.as_completed([generation]):
                pass
        finally:
            self.engine.cancel(generation)  # after Ctrl-C the next reply must not continue it
        return generation

    def reply_all(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig = DEFAULT_SAMPLING
    ) -> list[Generation]:
        """The replies to many prompts (`encode(messages).ids`), in their order.

        Reply i has the seed sampling.seed + i. ValueError for a prompt longer than the context.
        """
        return self.engine.generate(prompts, sampling, stop_ids=self._stop_ids, context_shift=False)
