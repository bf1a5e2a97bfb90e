"""The description of the API (/openapi.json), generated from the classes that parse its bodies."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from gptsmith.serve.protocol import (
    NEUTRAL,
    NO_EFFECT,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RequestBody,
    TokenizeBody,
)

_POST: dict[str, tuple[type[RequestBody], str, str]] = {
    "/v1/chat/completions": (ChatBody, "The reply to a conversation", "text/event-stream"),
    "/v1/completions": (CompletionBody, "The continuation of texts", "text/event-stream"),
    "/v1/embeddings": (EmbeddingBody, "A vector for each text", ""),
    "/v1/classify": (ClassifyBody, "The classes of texts", ""),
    "/tokenize": (TokenizeBody, "The token ids of a text or a conversation", ""),
    "/detokenize": (DetokenizeBody, "The text of token ids", ""),
}
_GET = {
    "/v1/models": "The models",
    "/v1/models/{name}": "One model",
    "/health": "Whether the server is running",
}
_STATUS = {
    "400": "The request is invalid; the message names the field",
    "401": "No API key, or a wrong one",
    "403": "The host or the origin is not allowed",
    "404": "No such model",
    "408": "The body took too long",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "The queue is full; see Retry-After",
    "500": "The server failed",
}


def document() -> dict[str, Any]:
    """The API as OpenAPI 3.1."""
    bodies = [(kind, "validation") for kind, _, _ in _POST.values()]
    _, schemas = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    for kind, _, _ in _POST.values():
        _complete(schemas["$defs"][kind.__name__])
    for title, rules in _RULES.items():
        schemas["$defs"][title] |= rules
    errors = {
        status: {"description": text, "content": _content("#/components/schemas/Error")}
        for status, text in _STATUS.items()
    }
    paths: dict[str, Any] = {}
    for path, (kind, summary, also) in _POST.items():
        answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if also:
            answer[also] = {"schema": _EVENT}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": _content(f"#/components/schemas/{kind.__name__}"),
                },
                "responses": {"200": {"description": summary, "content": answer}, **errors},
            }
        }
    for path, summary in _GET.items():
        get: dict[str, Any] = {
            "summary": summary,
            "responses": {
                "200": {
                    "description": summary,
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                **errors,
            },
        }
        if "{name}" in path:
            name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            get["parameters"] = [name]
        paths[path] = {"get": get}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptsmith", "version": version("gptsmith")},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _complete(body: dict[str, Any]) -> None:
    """Add to the schema of a body what pydantic does not know of its validators: a field that is
    null counts as omitted, and fields that change nothing are accepted."""
    required = body.get("required", ())
    for name, field in body["properties"].items():
        if name not in required and {"type": "null"} not in field.get("anyOf", ()):
            kept = {
                key: field.pop(key) for key in ("description", "title", "default") if key in field
            }
            body["properties"][name] = {"anyOf": [{**field}, {"type": "null"}], **kept}
    for name in sorted(NO_EFFECT):
        body["properties"].setdefault(name, {"description": "Has no effect."})
    for name, values in NEUTRAL.items():
        accepted = {"enum": [*values, None], "description": "Accepted for clients that send it."}
        body["properties"].setdefault(name, accepted)


def _content(reference: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": reference}}}


_NOT_NULL = {"not": {"type": "null"}}
_ONE_CONSTRAINT = {
    "not": {
        "required": ["response_format", "structured_outputs"],
        "properties": {
            "structured_outputs": {"type": "object"},
            "response_format": {
                "type": "object",
                "properties": {"type": {"enum": ["json_object", "json_schema"]}},
            },
        },
    }
}
_HAS_PROMPT = {"required": ["prompt"], "properties": {"prompt": _NOT_NULL}}
_RULES: dict[str, Any] = {
    "ChatBody": {
        "if": {
            "required": ["top_logprobs"],
            "properties": {"top_logprobs": {"type": "integer", "minimum": 1}},
        },
        "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
        "allOf": [
            _ONE_CONSTRAINT,
            {
                "if": {
                    "required": ["tools"],
                    "properties": {"tools": {"type": "array", "minItems": 1}},
                },
                "then": {
                    "properties": {
                        name: {"enum": [values[0], None]}
                        for name, values in NEUTRAL.items()
                        if len(values) > 1
                    }
                },
            },
        ],
    },
    "CompletionBody": _ONE_CONSTRAINT,
    "EmbeddingBody": {
        "not": {
            "properties": {
                "input": {"anyOf": [{"const": ""}, {"type": "array", "contains": {"const": ""}}]}
            }
        }
    },
    "TokenizeBody": {
        "oneOf": [
            _HAS_PROMPT,
            {
                "required": ["messages"],
                "properties": {"messages": {"type": "array", "minItems": 1}},
            },
        ],
        "if": _HAS_PROMPT,
        "then": {
            "properties": {
                "continue_final_message": {"enum": [False, None]},
                "continue_token_ids": {"enum": [[], None]},
            }
        },
        "else": {"properties": {"add_special_tokens": {"enum": [True, None]}}},
    },
    "ResponseFormat": {
        "if": {"properties": {"type": {"const": "json_schema"}}},
        "then": {"required": ["json_schema"], "properties": {"json_schema": _NOT_NULL}},
        "else": {"properties": {"json_schema": {"type": "null"}}},
    },
    "StructuredOutputs": {
        "oneOf": [
            {"required": ["json_object"], "properties": {"json_object": {"const": True}}},
            *(
                {"required": [name], "properties": {name: _NOT_NULL}}
                for name in ("json", "regex", "choice", "grammar")
            ),
        ]
    },
}
_EVENT = {
    "description": "One event; its data is a JSON object, or [DONE] in the last",
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
