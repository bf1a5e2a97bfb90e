"""The bodies of requests, in OpenAI's form with vLLM's extensions.

A field that would change the answer and that is not supported is rejected by name, never ignored.
Fields without effect here, and neutral values of unsupported ones, are accepted.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from gptsmith.flags import reason
from gptsmith.generate.constraint import Constraint
from gptsmith.generate.options import SamplingConfig
from gptsmith.serve.errors import ApiError
from gptsmith.serve.structured_output import ResponseFormat, StructuredOutputs

NO_EFFECT = frozenset(
    {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
}

MAX_FIELDS = 100  # of a body
MAX_INPUTS = 2048  # of a request for embeddings, as OpenAI's
RENAMED: Mapping[str, str] = {
    **{f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")},
    "guided_json_object": "json_object",
}
"""Fields of earlier versions of vLLM, and what they are called in structured_outputs."""

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
"""The engine looks for each one after every token, while all other clients wait."""

Texts = Annotated[list[str], Field(fail_fast=True)]
"""One wrong item is enough: collecting the errors of a million holds all clients up for seconds."""

TokenIds = Annotated[list[int], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

_TEXTS = {"type": "array", "minItems": 1, "items": {"type": "string"}}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_SEVERAL_IDS = {"type": "array", "minItems": 1, "items": _IDS}
Input = Annotated[
    str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)],
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, _SEVERAL_IDS]}),
]
"""A text, token ids, or several of either. Who reads it rejects empty lists."""

Messages = Annotated[
    list[
        Annotated[
            dict[str, Any],
            WithJsonSchema(
                {
                    "type": "object",
                    "required": ["role", "content"],
                    "properties": {
                        "role": {"type": "string", "description": "One that the template knows"},
                        "content": {
                            "description": "A text, or parts of one; null beside tool calls",
                            "type": ["string", "array", "null"],
                        },
                    },
                }
            ),
        ]
    ],
    Field(fail_fast=True),
]
"""A conversation. What a message may be is up to the chat template, which checks it."""

MAX_BIAS = 100


def _logit_bias(given: Any) -> Any:
    """Token id -> bias. Stops at the first wrong item, like the lists."""
    if not isinstance(given, dict):
        return given
    for token, bias in given.items():
        if not (str(token).isascii() and str(token).isdecimal()):
            raise ValueError(f"{token!r} should be a valid integer, a token id")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"of {token}, should be a number from -{MAX_BIAS} to {MAX_BIAS}")
    return {int(token): float(bias) for token, bias in given.items()}


LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        }
    ),
]

Body = TypeVar("Body", bound="RequestBody")


class RequestBody(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    model: str | None = None
    """Name of the model; may be omitted if only one is served."""

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body should be a JSON object")
        if len(body) > MAX_FIELDS:
            raise ValueError(f"the body has {len(body):,} fields")
        kept = {k: v for k, v in body.items() if v is not None and k not in NO_EFFECT}
        for name, values in NEUTRAL.items():
            # Beside tools only the default, which comes first, changes nothing.
            neutral = values[:1] if kept.get("tools") else values
            if name in kept and name not in cls.model_fields and kept[name] in neutral:
                del kept[name]
        return kept


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    """Send the numbers of tokens in a last chunk."""
    include_obfuscation: bool = False
    """Has no effect."""


class Generating(RequestBody):
    """A request for completions."""

    max_tokens: int | None = Field(None, ge=0)
    """Most tokens to generate."""
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    """0 or -1: all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias = {}
    """Token id -> what is added to its logit."""
    seed: int | None = None
    """The same seed gives the same completion. Completion i of n has the seed + i."""
    n: int = Field(1, ge=1, le=128)
    """Completions per prompt."""
    stop: StopString | Annotated[list[StopString], Field(max_length=64, fail_fast=True)] = []
    """Strings that end a completion and are not part of it."""
    stop_token_ids: TokenIds = []
    """Token ids that end a completion, besides those of the model."""
    stream: bool = False
    """Send the completion as it is generated, as server-sent events."""
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    """What the completion must be: any JSON object, or one of a schema."""
    structured_outputs: StructuredOutputs | None = None
    """The same, also as a regular expression, a choice or a grammar."""
    return_token_ids: bool = False
    """Also return the token ids of prompt and completion, and of the alternatives in logprobs."""

    @model_validator(mode="after")
    def _one_constraint(self) -> Generating:
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise ValueError("give either response_format or structured_outputs")
        return self

    @property
    def constraint_field(self) -> str:
        """The field that has the constraint."""
        return "structured_outputs" if self.structured_outputs else "response_format"

    def constraint(self) -> Constraint | None:
        """What the completion must be. ApiError for what cannot be one."""
        try:
            if self.structured_outputs is not None:
                return self.structured_outputs.constraint()
            return None if self.response_format is None else self.response_format.constraint()
        except ValueError as error:
            field = self.constraint_field
            raise ApiError(400, f"{field}: {error}", param=field) from None

    def sampling(self, max_new_tokens: int) -> SamplingConfig:
        """The settings for the engine; without a seed, a random one."""
        seed = secrets.randbits(62) if self.seed is None else self.seed % 2**63
        return SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k if self.top_k > 0 else None,
            top_p=self.top_p if self.top_p < 1 else None,
            min_p=self.min_p or None,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
        )


class ChatBody(Generating):
    """The body of /v1/chat/completions."""

    messages: Annotated[Messages, Field(min_length=1)]
    """The conversation: {"role": ..., "content": ...} each."""
    max_completion_tokens: int | None = Field(None, ge=0)
    """Another name of max_tokens."""
    logprobs: bool = False
    """Return the log-probability of each token."""
    top_logprobs: int = Field(0, ge=0, le=20)
    """How many of the likeliest tokens to return at each position."""
    tools: Objects = []
    """What the assistant may call, if the chat template shows it to the model."""
    continue_final_message: bool = False
    """Continue the last message, which is the assistant's, instead of adding one."""
    continue_token_ids: TokenIds = []
    """The first tokens of the reply, which is continued from there; with continue_final_message,
    what comes after that message's text."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, under either name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class CompletionBody(Generating):
    """The body of /v1/completions."""

    prompt: Input = ""
    """A text, token ids, or several of either."""
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    """Return log-probabilities, and this many of the likeliest tokens at each position."""
    echo: bool = False
    """Return the prompt too, before the completion."""


class EmbeddingBody(RequestBody):
    """The body of /v1/embeddings."""

    input: Input
    """A text, token ids, or several of either."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: of the bytes of float32 numbers, the least significant first."""

    @field_validator("input", mode="after")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        texts = several(given)
        if len(texts) > MAX_INPUTS:
            raise ValueError(f"has {len(texts):,} texts, but at most {MAX_INPUTS:,} are read")
        if not all(texts):
            raise ValueError("has an empty text")
        return given

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """Each text."""
        return several(self.input)


def several(given: Input) -> Sequence[Any]:
    """The texts of a field that has one or several, as text or as token ids."""
    one = not isinstance(given, list) or not given or isinstance(given[0], int)
    return [given] if one else given


class TokenizeBody(RequestBody):
    """The body of /tokenize: a text, or messages."""

    prompt: str | TokenIds | None = None
    """A text; or token ids, to be named."""
    messages: Messages = []
    continue_final_message: bool = False
    """Up to the end of the last message, which is the assistant's."""
    continue_token_ids: TokenIds = []
    """The first tokens of the reply."""
    add_special_tokens: bool = True
    """Also what the model's tokenizer puts before a text."""

    @model_validator(mode="after")
    def _consistent(self) -> TokenizeBody:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        if self.prompt is not None and (self.continue_final_message or self.continue_token_ids):
            raise ValueError("to continue a reply, give messages")
        if self.prompt is None and not self.add_special_tokens:
            raise ValueError("add_special_tokens: the chat template decides it for messages")
        return self


class DetokenizeBody(RequestBody):
    """The body of /detokenize."""

    tokens: TokenIds


class ClassifyBody(RequestBody):
    """The body of /v1/classify."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)]
    """A text, or several."""


def parse(body: bytes, kind: type[Body]) -> Body:
    """A body as an object. ApiError (400) that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = min(error.errors(), key=_rank)
        name = ".".join(str(part) for part in first["loc"][:1])
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            message = f"{place} is not supported"
            if name in RENAMED:
                message += f': use structured_outputs: {{"{RENAMED[name]}": ...}}'
        elif first["type"] == "missing":
            message = f"{place} is required"
        else:
            message = f"{name}: {reason(first['msg'])}" if name else reason(first["msg"])
        raise ApiError(400, message, param=name or None) from None


def _rank(error: Any) -> tuple[bool, bool]:
    """Unknown fields come first; of a field that may have several types, the errors of the type
    that it has."""
    return error["type"] != "extra_forbidden", error["type"].endswith("_type")
