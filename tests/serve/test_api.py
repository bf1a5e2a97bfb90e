"""OpenAI's endpoints, asked over HTTP."""

import json
from typing import Any

import pytest
from api_server import Api

from gptsmith.run import Run

ASK = [{"role": "user", "content": "What is 2 + 2?"}]


def streamed(api: Api, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends with [DONE]."""
    with api.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert all(event.startswith("data: ") for event in events)
    *chunks, done = [event.removeprefix("data: ") for event in events]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_chat_answers_with_the_text_of_the_library(api: Api) -> None:
    from gptsmith.generate.chat import Chat
    from gptsmith.generate.options import SamplingConfig

    model = api.server.models["chat"]
    original = Run.open(api.folder / "chat").load_model()
    chat = Chat(original, model.tokenizer, model.template)
    expected = chat.reply(ASK, SamplingConfig(seed=5, temperature=1, max_new_tokens=30))
    found = api.post("/v1/chat/completions", model="chat", messages=ASK, max_tokens=30, seed=5)
    [choice] = found["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["logprobs"] is None
    assert found["usage"]["prompt_tokens"] == len(chat.encode(ASK).ids)
    assert found["usage"]["completion_tokens"] == len(expected.ids)


def test_joined_deltas_are_the_unstreamed_text(api: Api) -> None:
    body = dict(model="chat", messages=ASK, max_tokens=60, seed=3, n=3)
    whole = api.post("/v1/chat/completions", **body)
    chunks = streamed(api, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    *parts, last = chunks
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(part["usage"] is None for part in parts)
    assert len({part["id"] for part in parts}) == 1
    for choice in whole["choices"]:
        mine = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in c["delta"] for c in mine[1:])
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == choice["message"]["content"]
        reasons = [c["finish_reason"] for c in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_no_chunk_has_half_a_character_or_part_of_a_stop_string(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model writes this text, one byte a token."""
    script = iter("a\N{GRINNING FACE} ST END STOP b".encode())
    forward = api.server.models["text"].engine._forward
    monkeypatch.setattr(forward, "sample", lambda _, rows, *more: [next(script) for _ in rows])
    body = dict(model="text", prompt="a", stop=["x", "STOP"], max_tokens=40)
    chunks = streamed(api, "/v1/completions", **body)
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "a\N{GRINNING FACE} ST END "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("\ufffd" not in text for text in texts)


def test_completions_take_texts_and_ids_and_lists_of_both(api: Api) -> None:
    body = dict(model="text", max_tokens=6, temperature=0)
    ids = {text: api.post("/tokenize", model="text", prompt=text)["tokens"] for text in ("ab", "c")}
    texts = api.post("/v1/completions", **body, prompt=["ab", "c"])["choices"]
    assert [choice["index"] for choice in texts] == [0, 1]
    one = api.post("/v1/completions", **body, prompt="ab")["choices"][0]
    assert one["text"] == texts[0]["text"]
    by_ids = api.post("/v1/completions", **body, prompt=ids["ab"])["choices"][0]
    assert by_ids["text"] == one["text"]
    both = api.post("/v1/completions", **body, prompt=[ids["ab"], ids["c"]])["choices"]
    assert [c["text"] for c in both] == [c["text"] for c in texts]
    chunks = streamed(api, "/v1/completions", **body, prompt=["ab", "c"])
    for i, choice in enumerate(texts):
        parts = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        assert "".join(parts) == choice["text"]


def test_n_texts_have_consecutive_seeds(api: Api) -> None:
    body = dict(model="text", prompt="ab", max_tokens=8)
    several = api.post("/v1/completions", **body, seed=7, n=3)["choices"]
    alone = [api.post("/v1/completions", **body, seed=7 + i)["choices"][0] for i in range(3)]
    assert [c["text"] for c in several] == [c["text"] for c in alone]


@pytest.mark.parametrize("warm", [False, True])
def test_echo_scores_the_whole_prompt(api: Api, warm: bool) -> None:
    """As lm-evaluation-harness asks: no new token, or one; the prefix cached or not."""
    from gptsmith.serve.served import ServedModel

    model: ServedModel = api.server.models["text"]
    prompt = model.tokenizer.encode("warm up" if warm else "cold one")
    body = dict(model="text", prompt=prompt, echo=True, logprobs=2, temperature=0)
    if warm:
        api.post("/v1/completions", **body, max_tokens=4)
    [choice] = api.post("/v1/completions", **body, max_tokens=0)["choices"]
    scored = choice["logprobs"]
    assert scored["tokens"] == [model.token_name(i) for i in prompt]
    assert choice["text"] == model.tokenizer.decode(prompt)
    assert scored["token_logprobs"][0] is None
    assert scored["top_logprobs"][0] is None
    import torch

    with torch.no_grad():
        original = Run.open(api.folder / "text").load_model()
        logits = original(torch.tensor([prompt]))[0].log_softmax(-1)
    expected = [float(logits[i, token]) for i, token in enumerate(prompt[1:])]
    assert scored["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert all(len(top) == 2 for top in scored["top_logprobs"][1:])
    assert scored["text_offset"][0] == 0
    longer = api.post("/v1/completions", **body, max_tokens=1)["choices"][0]["logprobs"]
    assert longer["tokens"][:-1] == scored["tokens"]
    assert longer["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)


def test_chat_logprobs_with_and_without_alternatives(api: Api) -> None:
    body = dict(model="chat", messages=ASK, max_tokens=5, temperature=0, logprobs=True)
    plain = api.post("/v1/chat/completions", **body)["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in plain] == [[]] * len(plain)
    found = api.post("/v1/chat/completions", **body, top_logprobs=3)
    for token in found["choices"][0]["logprobs"]["content"]:
        best = token["top_logprobs"][0]
        assert (best["token"], best["logprob"]) == (token["token"], token["logprob"])  # greedy
        assert len(token["top_logprobs"]) == 3
    chunks = streamed(api, "/v1/chat/completions", **body)
    parts = [
        c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]
    ]
    assert [token for part in parts for token in part] == plain


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": ASK, "max_tokens": -1}, "max_tokens", "greater"),
        ("chat/completions", {"messages": ASK, "temperature": "0"}, "temperature", "number"),
        ("chat/completions", {"messages": ASK, "grammar": "x"}, "grammar", "not supported"),
        ("chat/completions", {"messages": ASK, "functions": [{}]}, "functions", "not supported"),
        ("chat/completions", {"messages": ASK, "top_logprobs": 3}, None, "needs logprobs"),
        ("chat/completions", {"messages": [{"role": "x", "content": "y"}]}, "messages", "role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages", "content"),
        ("completions", {"prompt": [1, 999]}, "prompt", "id 999 is outside 0..261"),
        ("completions", {"prompt": "a" * 300}, None, "300 tokens"),
        ("completions", {"prompt": "a", "best_of": 4}, "best_of", "not supported"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "integer"),
        ("completions", {"prompt": "a", "logit_bias": {"٣": 1}}, "logit_bias", "integer"),
        ("completions", {"prompt": "a", "logit_bias": {"3": "1"}}, "logit_bias", "number"),
        ("completions", {"prompt": "a", "logit_bias": {"3": 101}}, "logit_bias", "from -100"),
        ("completions", {"prompt": "a", "stop": [""]}, "stop", "at least 1"),
        ("completions", {"prompt": "a", "stop": ["x"] * 65}, "stop", "at most 64"),
        ("completions", {"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids", "outside"),
        ("completions", {"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias", "outside"),
        ("completions", {"prompt": "a", "repetition_penalty": 1e-308}, None, "0.01"),
        ("completions", {"prompt": ["a"] * 99, "n": 99}, None, "9,801 completions, but at most"),
        ("chat/completions", {"messages": ASK * 300}, "messages", "300 messages"),
        (
            "chat/completions",
            {"messages": ASK, "max_tokens": 1, "max_completion_tokens": 2},
            None,
            "differ",
        ),
        (
            "chat/completions",
            {"messages": ASK, "tools": [{}], "tool_choice": "none"},
            "tool_choice",
            "not supported",
        ),
        (
            "chat/completions",
            {"messages": ASK, "tools": [{}], "parallel_tool_calls": False},
            "parallel_tool_calls",
            "not supported",
        ),
    ],
)
def test_a_wrong_field_is_named(
    api: Api, path: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    error = api.error(f"/v1/{path}", 400, model="chat", **body)
    assert api.error(f"/v1/{path}", 400, model="chat", stream=True, **body) == error
    assert says in error["message"]
    if param is not None:
        assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model": NaN}', b'{"a": "\\ud800"}', b"\xff"]
)
def test_a_body_that_is_no_object_is_one_line(api: Api, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = api.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert "\n" not in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {f"k{i}": 1 for i in range(10_000)},
        {"prompt": [None] * 10_000},
        {"prompt": [["a"]] * 10_000},
        {"prompt": ["a"] * 10_000 + [1]},
        {"prompt": "a", "stop_token_ids": ["a"] * 10_000},
        {"prompt": "a", "logit_bias": {f"k{i}": 1 for i in range(10_000)}},
        {"prompt": "a", "logit_bias": {str(i): "x" for i in range(10_000)}},
    ],
)
def test_one_wrong_item_ends_the_reading_of_a_body(body: dict[str, Any]) -> None:
    """All clients wait while a body is read: the errors of a million items took ten seconds."""
    from pydantic import ValidationError

    from gptsmith.serve.protocol import CompletionBody

    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 10


def test_fields_without_effect_and_neutral_values_are_accepted(api: Api) -> None:
    api.post(
        "/v1/chat/completions", model="chat", messages=ASK, max_tokens=1, user="me", store=False,
        metadata={"a": "b"}, service_tier="auto", tools=[], tool_choice="none", n=None,
        parallel_tool_calls=True, response_format={"type": "text"}, seed=None, stop=None,
    )  # fmt: skip


def test_a_prompt_that_is_too_long_names_both_numbers(api: Api) -> None:
    error = api.error("/v1/completions", 400, model="text", prompt="a" * 64)
    assert error["code"] == "context_length_exceeded"
    assert "64 tokens" in error["message"]
    [choice] = api.post(
        "/v1/completions", model="text", prompt="a" * 60, max_tokens=50, stop_token_ids=[]
    )["choices"]
    assert choice["finish_reason"] in ("length", "stop")


def test_one_token_is_one_token(api: Api) -> None:
    never = dict.fromkeys(map(str, range(256, 262)), -100)  # it does not end at once
    body = dict(model="chat", messages=ASK, max_tokens=1, logprobs=True, logit_bias=never)
    found = api.post("/v1/chat/completions", **body)
    assert found["usage"]["completion_tokens"] == 1
    assert len(found["choices"][0]["logprobs"]["content"]) == 1
    assert found["choices"][0]["finish_reason"] == "length"


def test_zero_tokens_are_no_text(api: Api) -> None:
    found = api.post("/v1/chat/completions", model="chat", messages=ASK, max_tokens=0)
    assert found["choices"][0]["message"]["content"] == ""
    assert found["choices"][0]["finish_reason"] == "length"


def test_an_unknown_model_is_404_with_the_names(api: Api) -> None:
    error = api.error("/v1/chat/completions", 404, model="gpt-5", messages=ASK)
    assert error["code"] == "model_not_found"
    assert "chat, text, classifier" in error["message"]
    error = api.error("/v1/chat/completions", 404, messages=ASK)
    assert "model: give one of" in error["message"]


def test_each_kind_of_model_says_which_endpoint_is_its_own(api: Api) -> None:
    error = api.error("/v1/chat/completions", 400, model="text", messages=ASK)
    assert "use /v1/completions" in error["message"]
    error = api.error("/v1/completions", 400, model="classifier", prompt="a")
    assert "use /v1/classify" in error["message"]
    error = api.error("/v1/classify", 400, model="chat", input="a")
    assert "is not a classifier" in error["message"]


def test_an_embedding_is_the_mean_of_the_last_hidden_vectors(api: Api) -> None:
    """Of length 1, for texts and ids, one or more than run at the same time."""
    import base64
    import struct

    import torch

    model = api.server.models["text"]
    texts = [f"text number {i}" * (i % 4 + 1) for i in range(70)]
    found = api.post("/v1/embeddings", model="text", input=texts)
    ids = [model.tokenizer.prompt(text) for text in texts]
    assert [item["index"] for item in found["data"]] == list(range(70))
    count = sum(map(len, ids))
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    original = Run.open(api.folder / "text").load_model()
    for item, tokens in zip(found["data"], ids, strict=True):
        with torch.no_grad():
            mean = original.hidden(torch.tensor([tokens]))[0].mean(0)
        assert item["embedding"] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    vectors = [item["embedding"] for item in found["data"]]
    by_ids = api.post("/v1/embeddings", model="text", input=ids)["data"]
    assert [item["embedding"] for item in by_ids] == vectors  # the same bits
    for one in (texts[3], ids[3]):
        [alone] = api.post("/v1/embeddings", model="text", input=one)["data"]
        assert alone["embedding"] == vectors[3]
    coded = api.post("/v1/embeddings", model="text", input=texts[3], encoding_format="base64")
    data = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == vectors[3]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": ""}, "input", "empty text"),
        ({"input": []}, "input", "empty text"),
        ({"input": ["a", ""]}, "input", "empty text"),
        ({"input": [[]]}, "input", "empty text"),
        ({"input": ["a"] * 2049}, "input", "at most 2,048"),
        ({"input": "a" * 65}, "input", "65 tokens"),
        ({"input": [1, 999]}, "input", "id 999 is outside"),
        ({"input": ["a", 1]}, "input", "string"),
        ({"input": "a", "dimensions": 8}, "dimensions", "not supported"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({}, "input", "required"),
    ],
)
def test_a_wrong_field_of_embeddings_is_named(
    api: Api, body: dict[str, Any], param: str | None, says: str
) -> None:
    error = api.error("/v1/embeddings", 400, model="text", **body)
    assert says in error["message"]
    assert param is None or error["param"] == param
    api.until_idle()


def test_classify_gives_probabilities(api: Api) -> None:
    data = api.post("/v1/classify", model="classifier", input=["buy", "hello"])["data"]
    assert [item["index"] for item in data] == [0, 1]
    for item in data:
        assert item["probabilities"].keys() == {"ham", "spam"}
        assert sum(item["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert item["predicted"] == max(item["probabilities"], key=item["probabilities"].get)


def test_special_tokens_in_text_stay_text(api: Api) -> None:
    model = api.server.models["chat"]
    special = set(model.tokenizer.special_tokens.values())
    spelled = "".join(model.tokenizer.special_tokens)
    ids = api.post("/tokenize", model="chat", prompt=spelled, add_special_tokens=False)["tokens"]
    assert not special & set(ids)
    asked = [{"role": "user", "content": spelled}]
    ids = api.post("/tokenize", model="chat", messages=asked)["tokens"]
    empty = api.post("/tokenize", model="chat", messages=[{"role": "user", "content": "x"}])
    assert [i for i in ids if i in special] == [i for i in empty["tokens"] if i in special]
    assert spelled in api.post("/detokenize", model="chat", tokens=ids)["prompt"]


def test_a_final_message_is_continued(api: Api) -> None:
    model = api.server.models["chat"]
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    found = api.post(
        "/v1/chat/completions", model="chat", messages=begun, max_tokens=5, temperature=0,
        continue_final_message=True, return_token_ids=True,
    )["choices"][0]  # fmt: skip
    prompt = model.template.prompt(ASK) + model.tokenizer.encode("It is")
    assert found["prompt_token_ids"] == prompt
    assert len(found["token_ids"]) <= 5
    error = api.error(
        "/v1/chat/completions", 400, model="chat", messages=ASK, continue_final_message=True
    )
    assert "not the assistant's" in error["message"]


def test_a_reply_is_continued_after_a_begun_message_and_tokens(api: Api) -> None:
    """As the page continues a text that was edited, continued and stopped."""
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    more = dict(model="chat", continue_final_message=True, continue_token_ids=[97, 240])
    ids = api.post("/tokenize", messages=begun, **more)["tokens"]
    model = api.server.models["chat"]
    assert ids == [*model.template.prompt(ASK), *model.tokenizer.encode("It is"), 97, 240]
    found = api.post(
        "/v1/chat/completions", messages=begun, **more, max_tokens=1, return_token_ids=True
    )
    assert found["choices"][0]["prompt_token_ids"] == ids
    assert api.post("/tokenize", model="chat", prompt=ids)["tokens"] == ids
    for body in (
        dict(prompt="a", continue_token_ids=[1]),
        dict(messages=ASK, add_special_tokens=False),
        dict(messages=ASK, prompt="a"),
        dict(),
    ):
        api.error("/tokenize", 400, model="chat", **body)
