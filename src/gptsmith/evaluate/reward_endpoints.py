"""Rewards from models behind a URL: a judge (evaluate/judge.py), or a classifier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx

from gptsmith.evaluate import judge
from gptsmith.evaluate.options import JudgeOptions
from gptsmith.evaluate.reference_metrics import Entry
from gptsmith.evaluate.rewards import Reward, RewardUnavailableError, Sample, answer_of

TEXTS = 256  # of one request


def judge_reward(options: JudgeOptions, cache: Path) -> Reward:
    """The judge's score of each completion beside the expected answer, 0 to 1; 0 where the judge
    replies without a verdict. ValueError without a model, RewardUnavailableError when the endpoint
    stays down."""
    judge.Endpoint(options).close()  # is one configured?

    def reward(samples: Sequence[Sample]) -> list[float]:
        entries = [Entry(s.prompt.place, s.prompt.question, answer_of(s), s.text) for s in samples]
        try:
            with closing(judge.Endpoint(options)) as endpoint:
                return [score / 100 for score in judge.scores(entries, endpoint, cache)]
        except judge.JudgeError as error:
            raise RewardUnavailableError(f"reward judge: {error}") from None

    return reward


def classifier_reward(name: str, options: JudgeOptions) -> Reward:
    """The probability of a label by a classifier, such as one that `gptsmith serve` serves.

    name: URL#LABEL; the path /v1/classify may be omitted. options: timeout and retries. ValueError
    for a name without a label, and for a server that does not answer with this label;
    RewardUnavailableError for one that does not answer.
    """
    where, _, label = name.rpartition("#")
    if not where or not label:
        raise ValueError(
            f"reward {name}: name the label whose probability is the reward, URL#LABEL"
        )
    address = httpx.URL(where)
    if not address.path.endswith("/classify"):
        base = address.path.rstrip("/").removesuffix("/v1")
        address = address.copy_with(path=f"{base}/v1/classify")

    def reward(samples: Sequence[Sample]) -> list[float]:
        texts = [sample.text for sample in samples]
        parts = [texts[i : i + TEXTS] for i in range(0, len(texts), TEXTS)]
        with httpx.Client(timeout=options.timeout) as client:
            return [p for part in parts for p in probabilities(client, part)]

    def probabilities(client: httpx.Client, texts: Sequence[str]) -> list[float]:
        reply = _post(client, address, {"input": texts}, options.retries)
        try:
            rows = sorted(reply.json()["data"], key=lambda row: row["index"])
            found = [float(row["probabilities"][label]) for row in rows]
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = " ".join(reply.text.split())[:80]
            raise ValueError(f"reward {name}: no probability of {label!r} in {shown!r}") from None
        if len(found) != len(texts):
            raise ValueError(f"reward {name}: {len(found)} classes for {len(texts)} texts")
        return found

    return reward


def _post(client: httpx.Client, address: httpx.URL, body: object, retries: int) -> httpx.Response:
    """The reply to a request, which is sent again while the server is busy or fails."""
    problem = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(judge.MAX_WAIT, judge.FIRST_WAIT * 2 ** (attempt - 1)))
        try:
            reply = client.post(address, json=body)
        except httpx.RequestError as error:
            problem = str(error) or type(error).__name__
            continue
        if reply.status_code == 200:
            return reply
        problem = f"HTTP {reply.status_code}: {' '.join(reply.text.split())[:160]}"
        if reply.status_code < 500 and reply.status_code not in judge.RETRY:
            break
    raise RewardUnavailableError(f"reward {address}: {problem}")
