"""The fields of a body that say what a completion must be, in OpenAI's and in vLLM's form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptsmith.generate.constraint import Constraint


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    """Has no effect."""
    schema_: dict[str, Any] = Field(alias="schema")
    """The JSON schema, which the completion meets whether `strict` is true or not."""
    description: str | None = None
    """Has no effect."""
    strict: bool | None = None
    """Has no effect."""


class ResponseFormat(BaseModel):
    """OpenAI's form of a constraint."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and is needed there")
        return self

    def constraint(self) -> Constraint | None:
        """None: no constraint. ValueError for what is not a JSON schema."""
        if self.json_schema is not None:
            return Constraint.json(self.json_schema.schema_)
        return Constraint.json_object() if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's form of a constraint: one of the fields."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    """A JSON schema, or its text."""
    json_object: bool | None = None
    """Any JSON object."""
    regex: str | None = None
    """A regular expression for the whole completion."""
    choice: list[str] | None = Field(None, min_length=1)
    """One of these is generated."""
    grammar: str | None = None
    """A context-free grammar in the form of Lark or GBNF."""

    @model_validator(mode="after")
    def _consistent(self) -> StructuredOutputs:
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(field is not None for field in given) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self

    def constraint(self) -> Constraint:
        """ValueError for what is not a JSON schema, and for an empty choice."""
        if self.json_ is not None:
            return Constraint.json(self.json_)
        if self.regex is not None:
            return Constraint.regex(self.regex)
        if self.choice is not None:
            return Constraint.choice(self.choice)
        return (
            Constraint.json_object() if self.grammar is None else Constraint.grammar(self.grammar)
        )
