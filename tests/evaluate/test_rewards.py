"""Rewards of completions: built in, from Python, from a judge, from a classifier."""

import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from api_server import served, serving_models
from judge_server import options
from local_web import serving
from runs import random_run

from gptsmith.data.prompts import Prompt
from gptsmith.evaluate.options import JudgeOptions
from gptsmith.evaluate.rewards import Sample, load_reward
from gptsmith.model.config import ModelConfig


def sample(text: str, answer: str | None = "4", tokens: int = 3, **row: object) -> Sample:
    messages = [{"role": "user", "content": "2 + 2?"}]
    return Sample(Prompt(messages, answer, row, "rows.jsonl:1"), text, tokens)


def rewarded(name: str, *samples: Sample, **more: object) -> list[float]:
    return load_reward(name, **{"cache": Path("nowhere"), **more})(samples)


def test_exact_and_number():
    texts = ["4", " 4\n", "It is 4.", "3 + 1 = 4", "5", "four", "1,004", "4.0"]
    samples = [sample(text) for text in texts]
    assert rewarded("exact", *samples) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert rewarded("number", *samples) == [1, 1, 1, 1, 0, 0, 0, 1]
    solution = "There are 3 and 1 more: <<3+1=4>>4\n#### 4"
    assert rewarded("number", sample("so 4", solution), sample("so 3", solution)) == [1, 0]


def test_regex_and_length():
    samples = [sample("<b>x</b>"), sample("x")]
    assert rewarded(r"regex:<b>.*</b>", *samples) == [1, 0]
    lengths = [sample("", tokens=n) for n in (1, 10, 15, 20, 30)]
    assert rewarded("length:10", *lengths) == [1, 1, 0.5, 0, 0]


def test_a_reward_that_compares_needs_an_answer():
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no expected answer.*--answer-column"):
        rewarded("exact", sample("4", None))
    assert rewarded("regex:4", sample("4", None)) == [1]


@pytest.mark.parametrize(
    "name",
    [
        *("exakt", "exact:1", "length:", "length:x", "http://localhost"),
        *("regex:(", "regex:", "regex", "regex:a{99999999999}"),
    ],
)
def test_unusable_names(name):
    with pytest.raises(ValueError, match=re.escape(name)):
        load_reward(name, cache=Path("nowhere"))


CODE = """
from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

@dataclass
class Score:
    value: float

def brevity(prompt, completion, row):
    assert prompt == "2 + 2?"
    return len(completion) * row.get("factor", 1)

def batch(prompts, completions, rows):
    return [len(completion) / len(completions) for completion in completions]

def broken(prompt, completion, row):
    return 1 / 0

def endless(prompt, completion, row):
    return float("inf")

def short(prompts, completions, rows):
    return [1.0]

def array(prompts, completions, rows):
    return np.array([len(completion) for completion in completions])

def tensor(prompt, completion, row):
    return torch.tensor([Score(len(completion)).value])

def several(prompt, completion, row):
    return torch.ones(2)

def ends(prompt, completion, row):
    sys.exit()

other = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    return path


def test_python_functions(code):
    samples = [sample("abc", factor=2), sample("a")]
    assert rewarded(f"{code}:brevity", *samples, trust_code=True) == [6, 1]
    assert rewarded(f"{code}:batch", *samples, trust_code=True) == [1.5, 0.5]
    assert rewarded(f"{code}:batch", trust_code=True) == []
    assert rewarded(f"{code}:array", *samples, trust_code=True) == [3, 1]
    assert rewarded(f"{code}:tensor", *samples, trust_code=True) == [3, 1]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("missing", "no function missing(prompt, completion, row)"),
        ("other", "no function other"),
        ("broken", "raises ZeroDivisionError"),
        ("endless", "returns inf for rows.jsonl:1, not a finite number"),
        ("short", "returns no list of 2 numbers"),
        ("several", "returns tensor([1., 1.]) for rows.jsonl:1, not a finite number"),
        ("ends", "raises SystemExit() for rows.jsonl:1"),
    ],
)
def test_python_functions_that_cannot_be_used(code, function, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        rewarded(f"{code}:{function}", sample("a"), sample("b"), trust_code=True)


def test_python_needs_trust(code):
    with pytest.raises(ValueError, match=r"review it, then pass --trust-code"):
        load_reward(f"{code}:brevity", cache=code.parent)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_reward(f"{code}x.py:brevity", trust_code=True, cache=code.parent)


def test_the_judge_scores_each_completion_once(serve, tmp_path):
    def reply(prompt: str, before: int) -> str:
        if "worth nothing" in prompt:
            return "I would rather not say."
        score = re.findall(r"worth (\d+)", prompt) or ["100"]  # when it is tried
        return json.dumps({"reason": "so", "score": int(score[-1])})

    server = serve(reply)
    samples = [sample("worth 80"), sample("worth 20"), sample("worth nothing")]
    given = dict(judge=options(server), cache=tmp_path / "cache")
    assert rewarded("judge", *samples, **given) == [0.8, 0.2, 0.0]
    seen = len(server.seen)
    assert rewarded("judge", *samples[:2], **given) == [0.8, 0.2]  # as a resumed run would ask
    assert len(server.seen) == seen + 1  # whether it is there


def test_a_judge_without_verdicts_is_known_before_it_is_needed(serve, tmp_path):
    server = serve(lambda prompt, before: "I would rather not say.")
    with pytest.raises(
        ValueError, match=r"^reward judge: no verdict in the answer 'I would.*model$"
    ):
        load_reward("judge", judge=options(server), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_judge_that_is_down_is_an_error_in_one_line(tmp_path):
    judge = JudgeOptions(url="http://localhost:9", model="judge", retries=0)
    with pytest.raises(ValueError, match=r"^reward judge: .*not reachable.*attempts: 1\)$"):
        rewarded("judge", sample("x"), judge=judge, cache=tmp_path)
    with pytest.raises(ValueError, match=r"--judge.model"):
        load_reward("judge", cache=tmp_path)


def test_the_probability_of_a_label_by_a_served_classifier(tmp_path):
    classes = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=64, vocab_size=257, labels=("bad", "good")
    )
    run = random_run(tmp_path / "run", classes)
    samples = [sample(f"text {i}") for i in range(300)]  # more than one request
    with serving_models({"classifier": served(run, "classifier")}) as api:
        good = rewarded(f"{api.url}#good", *samples)
        bad = rewarded(f"{api.url}/v1/classify#bad", *samples)
        with pytest.raises(ValueError, match="no probability of 'fine'"):
            rewarded(f"{api.url}#fine", samples[0])
        text = "text 7"
        expected = api.post("/v1/classify", input=text)["data"][0]["probabilities"]["good"]
    assert good[7] == expected
    assert [round(a + b, 4) for a, b in zip(good, bad, strict=True)] == [1.0] * 300
    judge = JudgeOptions(retries=0)
    with pytest.raises(
        ValueError, match=r"^reward http://localhost:9#good: .*/v1/classify is not reachable"
    ):
        rewarded("http://localhost:9#good", samples[0], judge=judge)


class Locked(BaseHTTPRequestHandler):
    """A classifier that needs a key, and repeats what it is given."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"]
        rows = [{"index": i, "probabilities": {"good": 0.5}} for i, _ in enumerate(body["input"])]
        known = key == "Bearer key-of-the-classifier"
        reply = json.dumps({"data": rows} if known else {"error": f"wrong: {key}"}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


def test_a_classifier_that_needs_a_key(monkeypatch):
    judge = JudgeOptions(key_variable="CLASSIFIER_KEY", retries=0)
    with pytest.raises(ValueError, match="no environment variable of this name"):
        load_reward("http://localhost:9#good", judge=judge, cache=Path("nowhere"))
    with serving(Locked) as url:
        monkeypatch.setenv("CLASSIFIER_KEY", "key-of-the-classifier")
        assert rewarded(f"{url}#good", sample("a"), sample("b"), judge=judge) == [0.5, 0.5]
        monkeypatch.setenv("CLASSIFIER_KEY", "some-other-key")
        with pytest.raises(ValueError, match=r'HTTP 401: {"error": "wrong: Bearer \*\*\*"}$'):
            rewarded(f"{url}#good", sample("a"), judge=judge)
