"""Constrained completions, such as JSON, from models with random weights."""

import json
import re
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from api_server import Api
from pydantic import BaseModel, ConfigDict, Field

pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

NO_SPACES = {str(ord(space)): -100 for space in " \n"}  # which fill a short context
ASK = [{"role": "user", "content": "Name a colour."}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Tone(Enum):
    DARK = "dark"
    GREYISH = "gräulich"


class Part(BaseModel):
    weight: Annotated[int, Field(ge=-9, le=99)] | None
    tone: Tone


class Colour(BaseModel):
    name: Annotated[str, Field(max_length=4)]
    rgb: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
    parts: Annotated[list[Part], Field(max_length=1)]
    kind: Literal["warm", "cold"]
    comment: None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    yes: bool


FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "strict", "strict": True, "schema": Strict.model_json_schema()},
}


@pytest.fixture
def client(api: Api):
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize("seed", range(5))
def test_openai_parses_a_pydantic_model(client, seed: int) -> None:
    body = dict(model="chat", messages=ASK, seed=seed, temperature=1, logit_bias=NO_SPACES)
    reply = client.chat.completions.parse(**body, response_format=Colour)
    assert isinstance(reply.choices[0].message.parsed, Colour)
    assert reply.choices[0].finish_reason == "stop"


def test_openai_streams_what_it_parses(client) -> None:
    body = dict(model="chat", messages=ASK, seed=1, logit_bias=NO_SPACES, response_format=Colour)
    with client.chat.completions.stream(**body) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.parsed is not None
    Colour.model_validate_json(text)


def test_n_texts_each_follow_the_schema(api: Api, client) -> None:
    found = client.chat.completions.create(
        model="chat", messages=ASK, n=6, seed=1, response_format=FORMAT, logprobs=True
    )
    assert {Strict.model_validate_json(c.message.content).yes for c in found.choices} <= {0, 1}
    assert all(choice.logprobs.content for choice in found.choices)
    again = client.completions.create(
        model="chat", prompt=["a", "b"], max_tokens=99, extra_body={"response_format": FORMAT}
    )
    assert all(Strict.model_validate_json(choice.text) for choice in again.choices)


def test_any_object_is_json_or_says_that_it_is_cut(api: Api) -> None:
    """A model that is loath to end an object, and one that likes to."""
    body = dict(model="chat", messages=ASK, response_format={"type": "json_object"}, seed=1)
    cut = api.post(CHAT, **body, logit_bias={str(ord("}")): -100}, max_tokens=50)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 50
    bias = {str(ord("}")): 100}
    whole = api.post(CHAT, **body, logit_bias=bias)
    assert isinstance(json.loads(whole["choices"][0]["message"]["content"]), dict)
    assert whole["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]"}, r"[a-c]{3}-\d"),
        ({"choice": ["yes", "no", "größer"]}, "yes|no|größer"),
        ({"grammar": 'root ::= "x" "y"+ "z"'}, "xy+z"),
        ({"json": {"enum": [1, 2]}}, "1|2"),
        ({"json": '{"const": "é"}', "json_object": False}, '"é"'),
        ({"json_object": True}, r"\{.*\}"),
    ],
)
def test_vllms_forms(api: Api, given: dict[str, Any], pattern: str) -> None:
    bias = {"logit_bias": {str(ord("}")): 100}} if "json_object" in given else {}
    body = dict(model="text", prompt="a", max_tokens=40, structured_outputs=given, seed=1, **bias)
    found = api.post(TEXT, **body, n=3)
    for choice in found["choices"]:
        assert re.fullmatch(pattern, choice["text"])
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "properties": {"a": {"type": "objekt"}}}}}},
            "response_format",
            "response_format: the constraint at /properties/a: Invalid type: objekt",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "is needed there"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "response_format.json_schema.schema is required",
        ),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"json": "[1"}}, "structured_outputs", "not a JSON schema"),
        ({"structured_outputs": {}}, "structured_outputs", "give one of json"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "give one"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs",
            "structured_outputs.whitespace_pattern is not supported",
        ),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, None, "give either"),
        (
            {"guided_json": {}},
            "guided_json",
            'guided_json is not supported: use structured_outputs: {"json": ...}',
        ),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "not supported"),
    ],
)  # fmt: skip
def test_a_constraint_that_is_not_one_is_rejected(
    api: Api, body: dict[str, Any], param: str | None, says: str
) -> None:
    error = api.error(CHAT, 400, model="chat", messages=ASK, **body)
    assert says in error["message"]
    assert error["param"] == param


def test_a_constraint_that_becomes_too_complex_is_an_error_of_its_own(api: Api) -> None:
    hard = dict(model="text", prompt="a", structured_outputs={"regex": "(a?){1000}a{1000}"})
    error = api.error(TEXT, 400, **hard)
    assert "too many" in error["message"]
    with api.client.stream("POST", TEXT, json={**hard, "stream": True}) as response:
        last = [line for line in response.iter_lines() if line][-1]
    assert "too many" in json.loads(last.removeprefix("data: "))["error"]["message"]
    api.until_idle()
    api.post(TEXT, model="text", prompt="a", max_tokens=1)
    api.until_idle()


def test_text_is_no_constraint(api: Api) -> None:
    body = dict(model="chat", messages=ASK, seed=1, max_tokens=9)
    assert (
        api.post(CHAT, **body, response_format={"type": "text"})["choices"]
        == api.post(CHAT, **body)["choices"]
    )
