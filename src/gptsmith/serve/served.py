"""A run that is being served: its engine, and what makes prompts of what clients send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from gptsmith.generate.chat import reply_stop_ids
from gptsmith.generate.constraint import Constraint, Matcher
from gptsmith.generate.engine import Engine
from gptsmith.model.classifier import GPTClassifier
from gptsmith.run import Run
from gptsmith.run.options import Quantized
from gptsmith.serve.errors import ApiError
from gptsmith.train.runtime import choose_precision

if TYPE_CHECKING:
    from gptsmith.chat_template.template import ChatTemplate, Message
    from gptsmith.model.gpt import GPTModel

Ids = TypeVar("Ids", bound=Iterable[int])


class ServedModel:
    """A model under a name.

    model: its weights are freed where the engine has a copy of its own. quantize: int8 or int4.
    cache_tokens, draft_model, draft_tokens: see Engine.
    engine: None for a classifier, which generates no text. ValueError for a classifier that is to
    be quantized, and where the kernels cannot serve quantized weights.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        model: GPTModel,
        max_batch_size: int,
        quantize: Quantized | None = None,
        cache_tokens: int | None = None,
        draft_model: GPTModel | None = None,
        draft_tokens: int | None = None,
    ) -> None:
        self.name, self.model = name, model
        self.tokenizer = run.tokenizer
        self.template: ChatTemplate | None = run.chat_template
        self.context_length = model.config.context_length
        self._run = run
        self.created = int(run.path.stat().st_mtime)
        self.engine = None
        if not isinstance(model, GPTClassifier):
            self.engine = Engine(
                model,
                run.tokenizer,
                max_batch_size,
                cache_tokens=cache_tokens,
                weights=quantize or "auto",
                keep_model=False,
                draft_model=draft_model,
                draft_tokens=draft_tokens,
            )
        elif quantize:
            raise ValueError(
                f"--quantize {quantize} is for text, and {run.path} is a classifier: serve it alone"
            )

    @property
    def kind(self) -> str:
        """classifier, chat or text."""
        if self.engine is None:
            return "classifier"
        return "text" if self.template is None else "chat"

    def describe(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gptsmith",
            "max_model_len": self.context_length,
            "kind": self.kind,
            "labels": list(self.model.config.labels or ()) or None,
            "special_tokens": list(self.tokenizer.special_tokens),
        }

    def generating_engine(self) -> Engine:
        """ApiError for a classifier."""
        if self.engine is None:
            raise ApiError(400, f"{self.name} is a classifier: use /v1/classify", param="model")
        return self.engine

    def chat_template(self) -> ChatTemplate:
        """ApiError for a model that is not a chat model."""
        self.generating_engine()
        if self.template is None:
            raise ApiError(
                400,
                f"{self.name} is not a chat model, it only continues a text: use /v1/completions",
                param="model",
            )
        return self.template

    @cached_property
    def chat_stop_ids(self) -> tuple[int, ...]:
        return reply_stop_ids(self.chat_template())

    def chat_ids(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] = (),
        continue_final: bool = False,
        begun: Sequence[int] = (),
    ) -> list[int]:
        """The ids before the reply to a conversation, then those of a reply that has begun.
        continue_final: up to the end of the last message, which is the assistant's. ApiError for
        an invalid conversation."""
        template = self.chat_template()
        self.checked_ids(begun, "continue_token_ids")
        if len(messages) > self.context_length:  # a template takes long for so many
            raise self._too_long(f"{len(messages):,} messages", "messages")
        conversation: Any = [_message(message) for message in messages]
        try:
            if not continue_final:
                return [*template.prompt(conversation, tools=tools or None), *begun]
            if conversation[-1].get("role") != "assistant":
                raise ValueError("continue_final_message: the last message is not the assistant's")
            ids, is_target, _ = template.encode(conversation, tools=tools or None)
            end = max(i for i, learned in enumerate(is_target) if learned)
            return [*ids[:end], *begun]  # without the token that ends the message
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def classify(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The class of each text, and the probabilities of all classes. ApiError for a model that
        is not a classifier, and for text that the tokenizer cannot encode."""
        if not isinstance(self.model, GPTClassifier):
            raise ApiError(400, f"{self.name} is not a classifier", param="model")
        # Not at the top: with what it needs it takes a quarter of a second to import.
        from gptsmith.evaluate.classification import max_length, predict

        precision = choose_precision("fp32", next(self.model.parameters()).device)
        try:
            found, _ = predict(self.model, self.tokenizer, texts, max_length(self._run), precision)
        except ValueError as error:
            raise ApiError(400, f"input: {error}", param="input") from None
        return found

    def compile(self, constraint: Constraint, field: str) -> Matcher:
        """For one completion. ApiError for a constraint that cannot be met or compiled."""
        try:
            return self.generating_engine().compile(constraint)
        except ValueError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None

    def prompt_ids(
        self, prompt: str | list[int], prefix: bool = True, param: str = "prompt"
    ) -> list[int]:
        """The ids of a prompt. ApiError for text that the tokenizer cannot encode, and for ids
        outside the vocabulary."""
        if not isinstance(prompt, str):
            return self.checked_ids(prompt, param)
        try:
            return self.tokenizer.prompt(prompt) if prefix else self.tokenizer.encode(prompt)
        except ValueError as error:
            raise ApiError(400, f"{param}: {error}", param=param) from None

    def checked_ids(self, ids: Ids, param: str) -> Ids:
        """The ids. ApiError for one outside the vocabulary."""
        V = self.tokenizer.vocab_size
        bad = next((i for i in ids if not 0 <= i < V), None)
        if bad is not None:
            raise ApiError(400, f"{param}: id {bad} is outside 0..{V - 1}", param=param)
        return ids

    def max_new_tokens(self, prompt: Sequence[int], wanted: int | None, param: str) -> int:
        """How many tokens may be generated after a prompt. ApiError if it fills the context."""
        if not prompt:
            raise ApiError(400, "the prompt is empty", param=param)
        most = self.context_length - len(prompt)
        if most < (0 if wanted == 0 else 1):
            raise self._too_long(f"{len(prompt):,} tokens", param)
        return most if wanted is None else min(wanted, most)

    def _too_long(self, length: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {length}, but the model's context has {self.context_length:,} tokens,"
            " and needs room for the completion: shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )

    def token_name(self, i: int) -> str:
        """A token as text, as OpenAI writes it: half a character is bytes:\\xf0\\x9f."""
        data = self.tokenizer.decode_bytes([i])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _message(message: dict[str, Any]) -> Message | dict[str, Any]:
    """A message with the role that templates know: OpenAI's clients call the system developer."""
    return message | {"role": "system"} if message.get("role") == "developer" else message
