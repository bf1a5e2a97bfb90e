"""Clients that people use, unchanged."""

import pytest
from api_server import Api

openai = pytest.importorskip("openai")

ASK = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def client(api: Api):
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0)


def test_openai_chat_streams_what_it_answers(client) -> None:
    body = dict(model="chat", messages=ASK, max_tokens=40, seed=1)
    whole = client.chat.completions.create(**body)
    stream = client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_openai_logprobs(client) -> None:
    found = client.chat.completions.create(
        model="chat", messages=ASK, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    tokens = found.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    joined = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert joined.startswith(found.choices[0].message.content)


def test_openai_completions_and_models(client) -> None:
    found = client.completions.create(model="text", prompt=["a", "b"], max_tokens=3, logprobs=1)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert len(found.choices[0].logprobs.tokens) == found.usage.completion_tokens / 2
    assert [model.id for model in client.models.list()] == ["chat", "text", "classifier"]
    assert client.models.retrieve("text").id == "text"


def test_openai_embeddings(client) -> None:
    """The client asks for base64 unless it is told otherwise."""
    texts = ["one", "another"]
    found = client.embeddings.create(model="text", input=texts)
    plain = client.embeddings.create(model="text", input=texts, encoding_format="float")
    assert [item.embedding for item in found.data] == [item.embedding for item in plain.data]
    assert [sum(x * x for x in item.embedding) for item in found.data] == pytest.approx([1, 1])
    with pytest.raises(openai.BadRequestError, match="dimensions is not supported"):
        client.embeddings.create(model="text", input="a", dimensions=8)


def test_harness_scores_what_it_scores_in_process(api: Api, tmp_path) -> None:
    """lm-evaluation-harness over HTTP: item by item the sums of the library, cold and warm."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    from gptsmith import cli
    from gptsmith.evaluate.harness import lm as harness

    run = api.folder / "text"
    assert cli.main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    remote = completions.LocalCompletionsAPI(
        base_url=f"{api.url}/v1/completions", model="text", tokenizer=str(tmp_path / "hf"),
        tokenizer_backend="huggingface", max_length=63, batch_size=1,
    )  # fmt: skip
    pairs = [("The cat", " sat"), ("The cat", " sat down"), ("One, two,", " three"), ("x", "y" * 9)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs * 2)]
    found = remote.loglikelihood(requests)
    local = harness(run, device="cpu")
    expected = local.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)
    settings = {"until": ["z"], "max_gen_toks": 6}
    asks = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in ("a", "b")]
    assert remote.generate_until(asks) == local.generate_until(asks)


def test_harness_gets_the_replies_of_the_library(api: Api) -> None:
    """local-chat-completions of lm-evaluation-harness, with its own chat history, cold and warm:
    item by item what the engine replies in this process."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    from gptsmith.generate.engine import Engine
    from gptsmith.generate.options import SamplingConfig
    from gptsmith.run import Run

    remote = completions.LocalChatCompletion(
        base_url=f"{api.url}/v1/chat/completions", model="chat", batch_size=1
    )
    shots = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
    chats = [[*shots, {"role": "user", "content": f"{n} + {n + 1}?"}] for n in range(8)]
    settings = {"until": ["q", "###"], "max_gen_toks": 24, "do_sample": False}
    asks = [
        Instance("generate_until", {}, (remote.apply_chat_template(chat), dict(settings)), i)
        for i, chat in enumerate(chats * 2)
    ]
    found = remote.generate_until(asks)
    model = api.server.models["chat"]
    engine = Engine(Run.open(api.folder / "chat").load_model(), model.tokenizer)
    expected = engine.generate(
        [model.template.prompt(chat) for chat in chats],
        SamplingConfig(temperature=0, max_new_tokens=24),
        stop=settings["until"],
        stop_ids=model.chat_stop_ids,
    )
    assert found == [generation.text for generation in expected] * 2
    assert len(set(found)) > 1


def test_openai_tries_again_when_the_queue_was_full(
    api: Api, client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptsmith.generate.request import QueueFull

    check, asked = api.server.worker.check_queue, []

    def full_at_first(engine, count: int) -> None:
        asked.append(count)
        if len(asked) == 1:
            raise QueueFull("all places are taken")
        check(engine, count)

    monkeypatch.setattr(api.server.worker, "check_queue", full_at_first)
    body = dict(model="text", prompt="a", max_tokens=1)
    patient = client.with_options(max_retries=1)
    assert patient.completions.create(**body).usage.completion_tokens <= 1
    assert len(asked) > 1
    asked.clear()
    with pytest.raises(openai.RateLimitError, match="busy: all places are taken"):
        client.completions.create(**body)


def test_openai_errors_have_their_classes(client) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'x' here"):
        client.chat.completions.create(model="x", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="grammar is not supported"):
        client.chat.completions.create(model="chat", messages=ASK, extra_body={"grammar": "g"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="text", prompt="a" * 100)
    assert caught.value.code == "context_length_exceeded"
