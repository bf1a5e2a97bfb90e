"""GSM8K (Cobbe et al. 2021): word problems; the last number of the written solution counts.

Prompts, stop strings and answer extraction are those of lm-evaluation-harness 0.4
(tasks/gsm8k/gsm8k.yaml), except for the worked examples: the harness draws new ones for each
question, here all questions have the first ones of the training split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gptsmith.chat_template.template import ChatTemplate, Message
from gptsmith.data.rows import Row, read_rows
from gptsmith.evaluate.report import Result, mean, prompt_form
from gptsmith.evaluate.task_data import data_folder, hub_rows, text
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model.gpt import GPTModel
from gptsmith.progress import progress
from gptsmith.tokenizer import Tokenizer

SHOTS = 5  # worked examples before a question, for a base model
ANSWER_TOKENS = 256  # maximum length of an answer
STOP = ("Question:", "</s>", "<|im_end|>")
INVALID = "[invalid]"

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    """The solution in words, then `#### ` and the number."""


# --- files ---------------------------------------------------------------------------------------


def load(
    where: Path | None = None, limit: int | None = None, shots: int = SHOTS
) -> tuple[list[Problem], list[Problem]]:
    """The first `limit` test problems (None: all), and `shots` training problems as examples.

    where: a file of test problems, with train.jsonl in the same folder, or a folder with test.jsonl
    and train.jsonl in it, in gsm8k/ or in eval/gsm8k/; rows of question and answer, as in OpenAI's
    files. Default: $GPTSMITH_DATA if it has them, else openai/gsm8k from the Hub.
    ValueError naming the row for one without question, answer or `#### `.
    """
    test = where or data_folder()
    if test is not None and test.is_dir():
        found = (test / folder / "test.jsonl" for folder in (".", "gsm8k", "eval/gsm8k"))
        test = next(filter(Path.is_file, found), test / "test.jsonl")
    if where is None and (test is None or not test.is_file()):
        examples = _problems(_hub_rows("train"), shots) if shots else []
        return _problems(_hub_rows("test"), limit), examples
    assert test is not None
    if not test.is_file():
        raise FileNotFoundError(f"{test}: no such file of problems")
    train = test.with_name("train.jsonl")
    if shots and (train == test or not train.is_file()):
        raise FileNotFoundError(
            f"{train}: not found, and the worked examples are in it; --shots 0 asks without"
        )
    examples = _problems(read_rows(train), shots) if shots else []
    problems = _problems(read_rows(test), limit)
    if not problems:
        raise ValueError(f"{test}: no problems in it")
    return problems, examples


def _problems(rows: Iterator[Row], limit: int | None) -> list[Problem]:
    problems = []
    for row in islice(rows, limit):
        problem = Problem(text(row, "question"), text(row, "answer"))
        if "#### " not in problem.answer:
            raise ValueError(f"{row.place}: the answer does not end in '#### NUMBER'")
        problems.append(problem)
    return problems


def _hub_rows(split: str) -> Iterator[Row]:
    return hub_rows(("openai/gsm8k", "main", split), "eval/gsm8k/test.jsonl and train.jsonl")


# --- score ---------------------------------------------------------------------------------------


def score(
    model: GPTModel,
    tokenizer: Tokenizer,
    template: str | None,
    problems: Sequence[Problem],
    examples: Sequence[Problem] = (),
    max_new_tokens: int = ANSWER_TOKENS,
) -> Result:
    """Share of problems with the correct number; the solutions are generated greedily.

    strict: the number after `#### `; flexible: the last number of the text. A base model (template
    None) reads the examples before each question; a chat model gets a user message, with the
    examples as earlier turns. Examples that do not fit into the context are left out; a question
    that does not fit counts as wrong. Notes say how many. ValueError without problems.
    """
    chat = None if template is None else ChatTemplate(template, tokenizer)
    C = model.config.context_length
    config = SamplingConfig(temperature=0, max_new_tokens=max_new_tokens)
    room = max(C - max_new_tokens, C // 2)
    prompts, shots = _prompts(tokenizer, chat, problems, examples, room)
    short_enough = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    short_enough.sort(key=lambda i: len(prompts[i]))  # little padding
    engine = Engine(model, tokenizer)
    stop_ids = [
        *tokenizer.special_ids.ends,
        *tokenizer.special_ids.control,
        *(chat.stop_ids if chat else ()),
    ]
    stop = () if chat else STOP
    generations = {
        i: engine.add(Request(prompts[i], config, stop, stop_ids, context_shift=chat is None))
        for i in short_enough
    }
    finished = engine.as_completed(generations.values())
    for _ in progress(finished, "answering GSM8K", len(generations)):
        pass
    solutions = [generations[i].text if i in generations else "" for i in range(len(problems))]
    items: list[dict[str, Any]] = []
    for number, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
        correct = _plain(problem.answer)
        found = {"strict": strict(solution), "flexible": flexible(solution)}
        items.append({
            "id": str(number + 1),
            "question": problem.question,
            "answer": correct,
            "generated": solution,
            "shots": shots[number],
            **{name: _plain(value) == correct for name, value in found.items()},
        })  # fmt: skip
    names = ("strict", "flexible")
    means = {name: mean([float(item[name]) for item in items]) for name in names}
    return Result(
        "gsm8k",
        len(items),
        {name: means[name][0] for name in names},
        {name: means[name][1] for name in names},
        items,
        notes=_notes(shots, len(examples), len(problems) - len(short_enough), C),
        conditions={
            "shots": len(examples),
            "max_new_tokens": max_new_tokens,
            "prompt": prompt_form(template),
        },
    )


def _prompts(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    problems: Sequence[Problem],
    examples: Sequence[Problem],
    room: int,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each question after as many examples as fit into `room`, and their number."""

    def ids(problem: Problem, k: int) -> list[int]:
        if template is None:
            parts = [f"Question: {p.question}\nAnswer: {p.answer}\n\n" for p in examples[:k]]
            return tokenizer.prompt("".join([*parts, f"Question: {problem.question}\nAnswer:"]))
        messages: list[Message] = []
        for p in examples[:k]:
            messages.append({"role": "user", "content": p.question})
            messages.append({"role": "assistant", "content": p.answer})
        return template.prompt([*messages, {"role": "user", "content": problem.question}])

    prompts, shots = [], []
    for problem in problems:
        k = len(examples)
        while len(prompt := ids(problem, k)) > room and k:
            k -= 1
        prompts.append(prompt)
        shots.append(k)
    return prompts, shots


def _notes(shots: Sequence[int], wanted: int, too_long: int, C: int) -> list[str]:
    notes = []
    if fewer := sum(k < wanted for k in shots):
        notes.append(
            f"{fewer:,} of {len(shots):,} questions were asked with fewer than {wanted} examples "
            f"({min(shots)} to {max(shots)}): more do not fit into {C:,} tokens with an answer"
        )
    if too_long:
        notes.append(f"{too_long:,} questions do not fit into {C:,} tokens and count as wrong")
    return notes


# --- numbers -------------------------------------------------------------------------------------


def strict(text: str) -> str:
    """The first number after `#### `, as written; INVALID if there is none."""
    found = _STRICT.search(text)
    return found[1] if found else INVALID


def flexible(text: str) -> str:
    """The last number of a text, as written; INVALID if there is none."""
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part) if found else INVALID


def _plain(text: str) -> str:
    """A number without separators and currency; of a whole solution, the number after `#### `."""
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()
