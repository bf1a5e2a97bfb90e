"""The judge over HTTP: retries and failures, API keys, addresses."""

import json
import threading
import time
from contextlib import closing
from itertools import count

import pytest
from judge_server import Reply, fair, options, worth

from gptsmith.evaluate import judge
from gptsmith.evaluate.endpoint import MAX_WAIT
from gptsmith.evaluate.judge import resolve
from gptsmith.evaluate.options import JudgeOptions

KEY = "sk-very-secret-0123456789"


# --- failures ------------------------------------------------------------------------------------


def test_server_errors_are_retried(serve, tmp_path, pauses):
    server = serve(lambda prompt, before: (500, {}, "no") if before < 2 else fair(prompt))
    assert judge.score([worth(5)], options(server), cache=tmp_path).metrics["score"] == 5
    assert len(server.seen) == 3
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2  # doubled, with jitter


@pytest.mark.parametrize(("after", "pause"), [(7, 7), (86400, MAX_WAIT)])
def test_retry_after_is_honoured_up_to_a_maximum(serve, tmp_path, pauses, after, pause):
    def busy(prompt: str, before: int) -> Reply:
        return (429, {"Retry-After": str(after)}, "{}") if before == 0 else fair(prompt)

    assert judge.score([worth(5)], options(serve(busy)), cache=tmp_path).n == 1
    assert pauses == [pause]


def test_retries_end(serve, tmp_path, pauses):
    server = serve(lambda prompt, before: (503, {}, "loading"))
    with pytest.raises(ValueError, match=r"HTTP 503: loading \(attempts: 3\)"):
        judge.score([worth(5)], options(server, retries=2), cache=tmp_path)
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {}, '{"error": {"message": "wrong key"}}'), "HTTP 401: .*wrong key"),
        ((302, {"Location": "http://127.0.0.1:9/"}, ""), "HTTP 302: Found"),
        ((200, {}, "<html>hello\x1b</html>"), "not a chat completion of openai: '<html>"),
        ((200, {}, '{"choices": []}'), "not a chat completion"),
        ((200, {}, '{"choices": [{"message": {"content": null}}]}'), "not a chat completion"),
        ((200, {}, "[" * 100_000), "not a chat completion"),
    ],
)
def test_other_errors_are_not_retried(serve, tmp_path, reply, message):
    server = serve(lambda prompt, before: reply)
    with pytest.raises(ValueError, match=message) as caught:
        judge.score([worth(5)], options(server), cache=tmp_path)
    assert len(server.seen) == 1
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_timeout_of_one_item_is_an_error_of_that_item(serve, tmp_path):
    done = threading.Event()

    def slow(prompt: str, before: int) -> str:
        if "is 2?" in prompt:
            done.wait(30)
        return fair(prompt)

    quick = options(serve(slow), timeout=3, retries=0)
    result = judge.score([worth(n) for n in (1, 2, 3)], quick, cache=tmp_path)
    done.set()
    assert result.metrics["score"] == 2
    assert result.items[1]["error"] == "no answer within 3 s (attempts: 1)"


def test_unreachable_server(serve, tmp_path, pauses):
    server = serve(fair)
    gone = options(server, retries=1)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"scored none of 1 items: http://127.* is not reachable"):
        judge.score([worth(5)], gone, cache=tmp_path)


def test_gives_up_after_failures_in_a_row_and_keeps_the_verdicts(serve, tmp_path):
    turn = count()

    def dying(prompt: str, before: int) -> Reply:
        if next(turn) < 3:
            return fair(prompt)
        time.sleep(0.02)
        return (500, {}, "gone")

    server = serve(dying)
    once = options(server, retries=0, parallel=2)
    result = judge.score([worth(n) for n in range(40)], once, cache=tmp_path)
    assert result.n == 3
    assert len(server.seen) < 30  # not many more than the 8: some were in flight
    assert any("not asked, as 8 requests in a row had failed" in i["error"]
               for i in result.items if i["score"] is None)  # fmt: skip
    server.reply = fair
    before = len(server.seen)
    assert judge.score([worth(n) for n in range(40)], once, cache=tmp_path).n == 40
    assert len(server.seen) == before + 37


# --- keys ----------------------------------------------------------------------------------------


def test_key_is_sent_and_stored_nowhere(serve, tmp_path, monkeypatch, capsys):
    def repeats(prompt: str, before: int) -> Reply:
        if "is 2?" in prompt:
            return (401, {}, f"wrong key {KEY}")
        return json.dumps({"reason": f"the key is {KEY}", "score": 4})

    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    server = serve(repeats)
    mine = options(server, key_variable="JUDGE_KEY")
    result = judge.score([worth(1), worth(2)], mine, cache=tmp_path)
    assert {request["key"] for request in server.seen} == {f"Bearer {KEY}"}
    assert result.items[0]["reason"] == "the key is ***"
    assert result.items[1]["error"] == "HTTP 401: wrong key ***"
    [kept] = tmp_path.iterdir()
    said = capsys.readouterr()
    for text in (kept.read_text(), repr(result), repr(mine), str(said)):
        assert KEY not in text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JUDGE_KEY", None, "no environment variable of this name contains an API key"),
        ("JUDGE_KEY", "", "no environment variable of this name contains an API key"),
        (KEY, None, "never the key itself"),
        ("JUDGE_KEY", "two\nlines-of-a-secret", "contains an API key"),
    ],
)
def test_no_message_repeats_the_key(serve, tmp_path, monkeypatch, variable, value, message):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    mine = options(serve(fair), key_variable=variable)
    with pytest.raises(ValueError, match=message) as caught:
        judge.score([worth(1)], mine, cache=tmp_path / "cache")
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "protocol", "address", "spoken"),
    [
        ("http://localhost:11434", "auto", "http://localhost:11434/api/chat", "ollama"),
        ("http://localhost:11434/", "auto", "http://localhost:11434/api/chat", "ollama"),
        ("http://x:1/api/chat", "auto", "http://x:1/api/chat", "ollama"),
        ("https://x/api", "auto", "https://x/api/chat", "ollama"),
        ("http://x:1", "ollama", "http://x:1/api/chat", "ollama"),
        ("http://x:11434/v1", "auto", "http://x:11434/v1/chat/completions", "openai"),
        ("http://x:11434", "openai", "http://x:11434/v1/chat/completions", "openai"),
        ("https://x/v1/", "auto", "https://x/v1/chat/completions", "openai"),
        ("http://x:8000", "auto", "http://x:8000/v1/chat/completions", "openai"),
        ("https://x/a/chat/completions?v=1", "auto", "https://x/a/chat/completions?v=1", "openai"),
    ],
)
def test_addresses_and_protocols(url, protocol, address, spoken):
    assert resolve(url, protocol) == (address, spoken)


def test_stored_url_has_no_secrets():
    secret = JudgeOptions(url="https://me:password@x/v1?key=secret", model="judge")
    with closing(judge.Endpoint(secret)) as endpoint:
        assert endpoint.public_url == "https://x/v1/chat/completions"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "--judge.model"),
        ({"url": "localhost:11434"}, "URL scheme should be 'http' or 'https'"),
        ({"url": "http://x:port"}, "url"),
    ],
)
def test_invalid_options_are_rejected_before_any_request(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        judge.score([worth(1)], JudgeOptions(**{"model": "judge", **changed}), cache=tmp_path)
