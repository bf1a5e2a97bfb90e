"""Rewards from models behind a URL: a judge (evaluate/judge.py), or a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import httpx

from gptsmith.evaluate import judge
from gptsmith.evaluate.endpoint import EndpointError, HttpEndpoint
from gptsmith.evaluate.options import JudgeOptions
from gptsmith.evaluate.reference_metrics import Entry
from gptsmith.evaluate.rewards import Reward, RewardUnavailableError, Sample, answer_of

TEXTS = 256  # of one request

E = TypeVar("E", bound=HttpEndpoint)


@contextmanager
def _open(name: str, endpoint: E) -> Iterator[E]:
    """The endpoint of a reward, closed afterwards; its errors name the reward."""
    try:
        with closing(endpoint):
            yield endpoint
    except EndpointError as error:
        raise RewardUnavailableError(f"reward {name}: {error}") from None


def judge_reward(options: JudgeOptions, cache: Path) -> Reward:
    """The judge's score of each completion beside the expected answer, 0 to 1; 0 where the judge
    replies without a verdict. ValueError without a model; RewardUnavailableError for an endpoint
    that does not answer, or not with a verdict: it is tried now, and may fail later."""
    with _open("judge", judge.Endpoint(options)) as endpoint:
        judge.check(endpoint)

    def reward(samples: Sequence[Sample]) -> list[float]:
        entries = [Entry(s.prompt.place, s.prompt.question, answer_of(s), s.text) for s in samples]
        with _open("judge", judge.Endpoint(options)) as endpoint:
            return [score / 100 for score in judge.scores(entries, endpoint, cache)]

    return reward


def classifier_reward(name: str, options: JudgeOptions) -> Reward:
    """The probability of a label by a classifier, such as one that `gptsmith serve` serves.

    name: URL#LABEL; the path /v1/classify may be omitted. options: key, timeout and retries.
    ValueError for a name without a label, and for a server that does not answer with this label;
    RewardUnavailableError for one that does not answer. One text is sent now, to check this.
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
        with _open(name, HttpEndpoint(address, options)) as endpoint:
            return [p for part in parts for p in probabilities(endpoint, part)]

    def probabilities(endpoint: HttpEndpoint, texts: Sequence[str]) -> list[float]:
        reply = endpoint.post({"input": texts})
        try:
            rows = sorted(reply.json()["data"], key=lambda row: row["index"])
            found = [float(row["probabilities"][label]) for row in rows]
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = endpoint.one_line(reply.text)[:80]
            raise ValueError(f"reward {name}: no probability of {label!r} in {shown!r}") from None
        if len(found) != len(texts):
            raise ValueError(f"reward {name}: {len(found)} classes for {len(texts)} texts")
        return found

    with _open(name, HttpEndpoint(address, options)) as endpoint:
        probabilities(endpoint, ["OK"])
    return reward
