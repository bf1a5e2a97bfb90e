"""Verdicts of a judge: what one looks like, asked of an endpoint, kept on disk."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gptsmith import files
from gptsmith.evaluate.endpoint import Endpoint, EndpointError, JudgeOptions, host
from gptsmith.evaluate.progress import progress

GIVE_UP = 8  # failures in a row after which nothing more is asked: the endpoint is not there

Verdict = tuple[int, str] | str  # number and reason, or why there is none

_REMINDER = "That is not the JSON object that was asked for. Reply with it alone."
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)


@dataclass(frozen=True)
class Form:
    """What a verdict looks like: a JSON object whose integer `name` is within 0..highest."""

    name: str
    highest: int

    def parse(self, text: str) -> tuple[int, str] | None:
        """The number and the reason; None for what is no verdict.

        Accepted: the object, in a Markdown fence too, and the number alone, of a score as 85/100.
        """
        text = text.strip()
        tail = r"(?:\s*/\s*100)?" if self.highest == 100 else ""
        if number := re.fullmatch(rf"([0-9]{{1,3}}){tail}", text):
            found: Any = {self.name: int(number[1])}
        else:
            fenced = _FENCED.fullmatch(text)
            try:
                found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_object)
            except (ValueError, RecursionError):
                return None
        if not isinstance(found, dict):
            return None
        value, reason = found.get(self.name), found.get("reason")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= self.highest:
            return None
        return value, reason if isinstance(reason, str) else ""


def verdicts(
    prompts: Sequence[str], form: Form, options: JudgeOptions, cache: Path, doing: str
) -> tuple[list[Verdict], dict[str, Any]]:
    """A verdict on each prompt, from the folder `cache` or the endpoint; and who judged, how.

    A verdict is written to the cache when it comes, called by a digest of model, settings and
    prompt. After GIVE_UP failures in a row nothing more is asked.
    """
    with Endpoint(options) as endpoint:
        cache.mkdir(parents=True, exist_ok=True)
        known: dict[str, Verdict] = {}
        for prompt in prompts:
            if (kept := _kept(cache / _name(endpoint.body(_ask(prompt))), form)) is not None:
                known[prompt] = kept
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if known and missing:
            say = f"{doing}: {len(known):,} verdicts are in {cache}, {len(missing):,} are missing"
            print(say, file=sys.stderr)

        def work(prompt: str) -> tuple[Verdict, bool]:
            """The verdict, and whether the endpoint answered."""
            try:
                return _one(endpoint, prompt, form, cache), True
            except EndpointError as error:
                return str(error), False

        stop, failures, gave_up = threading.Event(), 0, ""
        found = in_parallel(work, missing, options.parallel, stop)
        for prompt, (verdict, answered) in progress(found, doing, len(missing)):
            known[prompt] = verdict
            failures = 0 if answered else failures + 1
            if failures == GIVE_UP:
                stop.set()
                gave_up = f"not asked, as {GIVE_UP} requests in a row had failed: {verdict}"
        for prompt in missing:
            known.setdefault(prompt, gave_up)
        who = {
            "judge": endpoint.model,
            "endpoint": host(endpoint.address),
            "protocol": endpoint.protocol,
            "settings": endpoint.settings(),
        }
    return [known[prompt] for prompt in prompts], who


def _one(endpoint: Endpoint, prompt: str, form: Form, cache: Path) -> Verdict:
    """Ask, and once more where the answer is no verdict; what is one is kept for good."""
    messages = _ask(prompt)
    place = cache / _name(endpoint.body(messages))
    for _ in range(2):
        body = endpoint.body(messages)
        text = endpoint.ask(body)
        verdict = form.parse(text)
        if verdict is not None:
            files.write_json(place, {"request": body, "answer": text})
            return verdict
        # At temperature 0 the same question would have the same answer.
        messages = [
            *messages,
            {"role": "assistant", "content": text[:2000]},
            {"role": "user", "content": _REMINDER},
        ]
    return f"no verdict in the answer {' '.join(text.split())[:80]!r}"


def _ask(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _name(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() + ".json"


def _kept(path: Path, form: Form) -> tuple[int, str] | None:
    """A verdict of an earlier run; a file that was damaged since is as good as none."""
    try:
        return form.parse(files.read_json(path)["answer"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError):
        print(f"{path} is damaged: asking again", file=sys.stderr)
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def in_parallel(
    work: Callable[[str], Any], jobs: Sequence[str], threads: int, stop: threading.Event
) -> Iterator[tuple[str, Any]]:
    """Each job with its result, as they are done; after `stop`, those that were begun.

    Daemon threads, unlike those of concurrent.futures, let Ctrl-C end the process at once.
    """
    waiting: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[tuple[str, Any, BaseException | None] | None] = SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def run() -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except Empty:
                break
            try:
                done.put((job, work(job), None))
            except BaseException as error:  # a full disk, for example: raised below
                done.put((job, None, error))
        done.put(None)

    count = min(threads, len(jobs))
    for _ in range(count):
        threading.Thread(target=run, daemon=True).start()
    try:
        while count:
            item = done.get()
            if item is None:
                count -= 1
                continue
            job, result, error = item
            if error is not None:
                raise error
            yield job, result
    finally:
        stop.set()
