"""GSM8K (Cobbe et al. 2021): word problems, scored by the last number of the generated solution.

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

from gptsmith.chat_template.template import ChatTemplate, Message
from gptsmith.data.rows import Row, read_rows
from gptsmith.evaluate.result import Result, encodable_indices, left_out_note, prompt_form
from gptsmith.evaluate.task_data import find, hub_rows, text
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model.gpt import GPTModel
from gptsmith.progress import progress
from gptsmith.tokenizer import Tokenizer

HUB = ("openai/gsm8k", "main")
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
    test = where
    if test is None or test.is_dir():
        folders = ("", "gsm8k/", "eval/gsm8k/")
        test = find("gsm8k", where, [f"{folder}test.jsonl" for folder in folders])
    if test is None:
        files = "eval/gsm8k/test.jsonl and train.jsonl"
        rows = {split: hub_rows((*HUB, split), files) for split in ("train", "test")}
    elif not test.is_file():
        raise FileNotFoundError(f"{test}: no such file")
    else:
        train = test.with_name("train.jsonl")
        if shots and (train == test or not train.is_file()):
            raise FileNotFoundError(
                f"{train}: not found, and the worked examples are in it; --shots 0 asks without"
            )
        rows = {"train": read_rows(train), "test": read_rows(test)}
    examples = _problems(rows["train"], shots) if shots else []
    problems = _problems(rows["test"], limit)
    if not problems:
        raise ValueError(f"{test or HUB[0]}: no problems in it")
    return problems, examples


def _problems(rows: Iterator[Row], limit: int | None) -> list[Problem]:
    problems = []
    for row in islice(rows, limit):
        problem = Problem(text(row, "question"), text(row, "answer"))
        solution, _, number = problem.answer.rpartition("#### ")
        if not solution or not re.fullmatch(r"-?[0-9]*\.?[0-9]+", _plain(number)):
            raise ValueError(f"{row.place}: the answer does not end in '#### NUMBER'")
        problems.append(problem)
    return problems


# --- score ---------------------------------------------------------------------------------------


def score(
    model: GPTModel,
    tokenizer: Tokenizer,
    template: str | None,
    problems: Sequence[Problem],
    examples: Sequence[Problem] = (),
    max_new_tokens: int = ANSWER_TOKENS,
    weights: str = "auto",
) -> Result:
    """Share of problems with the correct number; the solutions are generated greedily.

    strict: the number after `#### `; flexible: the last number of the text. A base model (template
    None) reads the examples before each question; a chat model gets a user message, with the
    examples as earlier turns. Examples that do not fit into the context are left out; a question
    that does not fit counts as wrong. Questions and examples that the tokenizer cannot encode are
    left out. Notes say how many. weights: see Engine. ValueError without problems.
    """
    chat = None if template is None else ChatTemplate(template, tokenizer)
    C = model.config.context_length
    room = max(C - max_new_tokens, C // 2)
    asking = [p.question if chat else _text([p]) for p in problems]
    known, why = encodable_indices(tokenizer, asking)
    notes = []
    if unknown := sorted({*range(len(problems))} - {*known}):
        notes.append(left_out_note("gsm8k", [str(i + 1) for i in unknown], len(problems), why))
    if problems and not known:
        raise ValueError(notes[0])
    shown, why = encodable_indices(tokenizer, [p.question + p.answer for p in examples])
    if len(shown) < len(examples):
        count = len(examples) - len(shown)
        notes.append(f"gsm8k: {count:,} of {len(examples):,} examples are left out: {why}")
    examples = [examples[i] for i in shown]
    asked = {i: _prompt(tokenizer, chat, problems[i], examples, room) for i in known}
    fitting = sorted((len(ids), i) for i, (ids, _) in asked.items() if len(ids) <= room)
    engine = Engine(model, tokenizer, weights=weights)
    config = SamplingConfig(temperature=0, max_new_tokens=max_new_tokens)
    stop_ids = [*tokenizer.special_ids.eos_ids, *tokenizer.special_ids.control]
    stop, stop_ids = (STOP, stop_ids) if chat is None else ((), [*stop_ids, *chat.stop_ids])
    generations = {
        i: engine.add(Request(asked[i][0], config, stop, stop_ids, context_shift=chat is None))
        for _, i in fitting  # by length: little padding
    }
    finished = engine.as_completed(generations.values())
    for _ in progress(finished, "answering GSM8K", len(generations)):
        pass
    items = []
    for i, (_, shots) in asked.items():
        solution = generations[i].text if i in generations else ""
        correct = _plain(problems[i].answer)
        items.append({
            "id": str(i + 1),
            "question": problems[i].question,
            "answer": correct,
            "generated": solution,
            "shots": shots,
            "strict": _plain(strict(solution)) == correct,
            "flexible": _plain(flexible(solution)) == correct,
        })  # fmt: skip
    all_shots = [shots for _, shots in asked.values()]
    if fewer := sum(k < len(examples) for k in all_shots):
        notes.append(
            f"{fewer:,} of {len(asked):,} questions were asked with fewer than {len(examples)} "
            f"examples ({min(all_shots)} to {max(all_shots)}): more do not fit into {C:,} tokens "
            "with an answer"
        )
    if too_long := len(asked) - len(fitting):
        notes.append(f"{too_long:,} questions do not fit into {C:,} tokens and count as wrong")
    conditions = {
        "shots": len(examples),
        "max_new_tokens": max_new_tokens,
        "prompt": prompt_form(template),
    }
    return Result.from_items(
        "gsm8k", items, ("strict", "flexible"), notes=notes, conditions=conditions
    )


def _prompt(
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    problem: Problem,
    examples: Sequence[Problem],
    room: int,
) -> tuple[list[int], int]:
    """Token ids of a question after as many examples as fit into `room`, and their number."""
    for k in range(len(examples), -1, -1):
        if chat is None:
            ids = tokenizer.prompt(_text([*examples[:k], problem]))
        else:
            messages: list[Message] = []
            for p in examples[:k]:
                messages.append({"role": "user", "content": p.question})
                messages.append({"role": "assistant", "content": p.answer})
            ids = chat.prompt([*messages, {"role": "user", "content": problem.question}])
        if len(ids) <= room:
            break
    return ids, k


def _text(problems: Sequence[Problem]) -> str:
    """The last problem as a question, after the others with their answers."""
    *solved, asked = problems
    parts = [f"Question: {p.question}\nAnswer: {p.answer}\n\n" for p in solved]
    return "".join([*parts, f"Question: {asked.question}\nAnswer:"])


# --- numbers -------------------------------------------------------------------------------------


def strict(text: str) -> str:
    """The first number after `#### `, as written; INVALID if there is none."""
    found = _STRICT.search(text)
    return found[1] if found else INVALID


def flexible(text: str) -> str:
    """The last number of a text, as written; INVALID if there is none."""
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part) if found else INVALID


def last_number(text: str) -> str:
    """The last number of a text without separators and currency; INVALID if there is none."""
    return _plain(flexible(text))


def _plain(text: str) -> str:
    """A number without separators and currency; of a whole solution, the number after `#### `."""
    text = text.strip()
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()
