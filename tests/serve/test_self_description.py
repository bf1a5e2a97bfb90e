"""What a server says about itself: models, health, metrics, and the description of its API."""

import re
import time
from pathlib import Path

import pytest
from api_server import Api, chat_run, serving_models

from gptsmith.serve.protocol import (
    NEUTRAL,
    NO_EFFECT,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    TokenizeBody,
)
from gptsmith.serve.served import ServedModel

CHAT = [{"role": "user", "content": "a"}]
SCHEMA = {"name": "a", "schema": {}}


def test_models_health_metrics_and_description(api: Api) -> None:
    listed = api.client.get("/v1/models").json()["data"]
    assert [(m["id"], m["kind"]) for m in listed] == [
        ("chat", "chat"), ("text", "text"), ("classifier", "classifier"),
    ]  # fmt: skip
    assert api.client.get("/v1/models/chat").json() == listed[0]
    assert api.client.get("/health").json() == {"status": "ok"}
    api.post("/v1/completions", model="text", prompt="a", max_tokens=3)
    api.until_idle()
    metrics = api.client.get("/metrics").text
    assert "gptsmith_new_tokens_total" in metrics
    assert "gptsmith_running_requests 0.0" in metrics
    assert "gptsmith_waiting_requests 0.0" in metrics
    assert "gptsmith_cache_used_ratio" in metrics
    described = api.client.get("/openapi.json").json()
    assert described["paths"].keys() >= {"/v1/chat/completions", "/v1/completions"}
    response = api.client.get("/v1/nothing")
    assert response.status_code == 404
    assert "is not served" in response.json()["error"]["message"]
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        response = api.client.request(method, "/v1/completions")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
    for path in ("/v1/models", "/metrics", "/"):  # also without a body of JSON
        response = api.client.post(path)
        assert response.status_code == 405
        assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert api.client.post("/v1/nothing").status_code == 404


def test_the_description_has_what_validators_check(api: Api) -> None:
    """schemathesis found fields that the server takes and the description did not, and the other
    way round."""
    bodies = api.client.get("/openapi.json").json()["components"]["schemas"]
    omitted = dict.fromkeys(
        name
        for name, field in bodies["CompletionBody"]["properties"].items()
        if {"type": "null"} in field.get("anyOf", ()) or None in field.get("enum", (None,))
    )
    assert omitted.keys() == bodies["CompletionBody"]["properties"].keys()
    given = {"model": "text", "prompt": "a", "max_tokens": 1}
    assert api.post("/v1/completions", **omitted | given)["choices"]
    bias = bodies["ChatBody"]["properties"]["logit_bias"]["anyOf"][0]
    assert re.fullmatch(bias["propertyNames"]["pattern"], "12")
    assert not re.fullmatch(bias["propertyNames"]["pattern"], "x")
    assert bodies["ChatBody"]["then"] == {
        "required": ["logprobs"],
        "properties": {"logprobs": {"const": True}},
    }
    assert [rule["required"] for rule in bodies["TokenizeBody"]["oneOf"]] == [
        ["prompt"],
        ["messages"],
    ]


def test_the_description_has_the_fields_that_change_nothing(api: Api) -> None:
    """As clients of other servers send them."""
    bodies = api.client.get("/openapi.json").json()["components"]["schemas"]
    for kind in (ChatBody, CompletionBody, EmbeddingBody, TokenizeBody):
        described = bodies[kind.__name__]["properties"]
        assert described.keys() == {*kind.model_fields, *NO_EFFECT, *NEUTRAL}
        assert described["best_of"]["enum"] == [1, None]
    told = {"user": "me", "metadata": {"a": 1}, "parallel_tool_calls": False, "tools": []}
    said = {"model": "chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert api.post("/v1/chat/completions", **said, **told)["choices"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a", "continue_final_message": True}),
        ("/tokenize", {"prompt": "a", "continue_token_ids": [1]}),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": False}),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [{}], "tool_choice": "none"}),
        ("/v1/completions", {"structured_outputs": {}}),
        ("/v1/completions", {"structured_outputs": {"regex": "a", "grammar": "b"}}),
        ("/v1/completions", {"response_format": {"type": "json_schema"}}),
        ("/v1/completions", {"response_format": {"type": "text", "json_schema": SCHEMA}}),
    ],
)
def test_the_server_rejects_what_the_description_excludes(
    api: Api, path: str, body: dict[str, object]
) -> None:
    given = {"model": "chat" if "messages" in body else "text", **body}
    assert api.client.post(path, json=given).status_code == 400


def test_the_description_says_which_fields_depend_on_others(api: Api) -> None:
    bodies = api.client.get("/openapi.json").json()["components"]["schemas"]
    outputs, tokenize = bodies["StructuredOutputs"], bodies["TokenizeBody"]
    assert {name for rule in outputs["oneOf"] for name in rule["required"]} == {
        *outputs["properties"]
    }
    assert bodies["ResponseFormat"]["then"]["required"] == ["json_schema"]
    assert bodies["ResponseFormat"]["else"]["properties"] == {"json_schema": {"type": "null"}}
    assert tokenize["then"]["properties"] == {
        "continue_final_message": {"enum": [False, None]},
        "continue_token_ids": {"enum": [[], None]},
    }
    assert tokenize["else"]["properties"] == {"add_special_tokens": {"enum": [True, None]}}


def test_metrics_include_the_draft_model(tmp_path: Path) -> None:
    """Its keys and values are in memory beside those of the model."""
    run = chat_run(tmp_path / "chat", context_length=4096)
    model, draft = (run.load_model("last", "cpu") for _ in range(2))
    with serving_models({"chat": ServedModel("chat", run, model, 2, draft_model=draft)}) as api:
        assert metric(api, "draft_cache_used_ratio") == metric(api, "accepted_draft_tokens") == 0
        never = dict.fromkeys(map(str, range(256, 262)), -100)  # it has all its tokens
        body = dict(model="chat", prompt="a" * 200, max_tokens=3000, stream=True, logit_bias=never)
        with api.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(40):
                next(lines)
            while not metric(api, "draft_cache_used_ratio"):  # between two drafts it has no pages
                assert next(lines) != "data: [DONE]"
            assert metric(api, "draft_cache_used_ratio") < 1
        assert metric(api, "accepted_draft_tokens") > 0
        deadline = time.monotonic() + 30
        while metric(api, "draft_cache_used_ratio") or metric(api, "cache_used_ratio"):
            assert time.monotonic() < deadline


def metric(api: Api, name: str) -> float:
    text = api.client.get("/metrics").text
    [value] = re.findall(rf"^gptsmith_{name} (\S+)$", text, re.MULTILINE)
    return float(value)
