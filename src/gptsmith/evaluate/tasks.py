"""Multiple-choice tasks and where their files lie.

A file is .jsonl .json .csv .tsv (each also .gz) .parquet or .arrow, and each row of it a question,
in one of these forms, that of the Hugging Face Hub first:

    hellaswag       ctx_a, ctx_b, activity_label, endings (list), label (0 to 3)
    hellaswag_gpt2  ctx, endings, label: the same files, asked as the reproductions of GPT-2 ask
                    (Karpathy, build-nanogpt): the context as it stands and no activity before it;
                    of these GPT-2 124M has 0.294 right by mean per token
    arc_easy        question, choices {text: [...], label: [...]}, answerKey; or AI2's original,
    arc_challenge   question {stem, choices: [{text, label}, ...]}, answerKey; or COMMON
    piqa            goal, sol1, sol2, label (0 or 1); or COMMON
    winogrande      sentence (with a _ to be filled), option1, option2, answer (1 or 2);
                    or llm-foundry's context_options (list), continuation, gold (0 or 1)
    lambada         text, whose last word is to be found; or context, continuation
    mmlu            a folder with test/ and dev/ (the worked examples), in each a file for every
                    subject, such as anatomy_test.csv and anatomy_dev.csv: csv without a header of
                    question, four choices, letter; or rows of question, choices (list), answer
                    (0 to 3) and, unless the file's name says it, subject

COMMON is llm-foundry's: query ("Question: ..."), choices (list), gold (0 for the first).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from gptsmith.data import corpora
from gptsmith.data.columns import listed
from gptsmith.data.corpora import HubName
from gptsmith.data.rows import Row, read_rows, row_files
from gptsmith.evaluate import prompts
from gptsmith.evaluate.prompts import LETTERS, Made, Question

SHOTS = 5  # worked examples before a question of MMLU, as is customary; other tasks show none


class _Task(NamedTuple):
    """local: where below a data folder, by patterns of which the first that fits is taken."""

    question: Callable[[Row], Made]
    columns: str  # of the forms, for an error
    local: tuple[str, ...]
    hub: HubName


_COMMON = "'query', 'choices', 'gold'"
_HELLASWAG = ("hellaswag/hellaswag_val*.jsonl",), HubName("Rowan/hellaswag", None, "validation")
_TASKS = {
    "hellaswag": _Task(
        prompts.hellaswag,
        "'ctx_a', 'ctx_b', 'activity_label', 'endings', 'label'",
        *_HELLASWAG,
    ),
    "hellaswag_gpt2": _Task(prompts.hellaswag_gpt2, "'ctx', 'endings', 'label'", *_HELLASWAG),
    "arc_easy": _Task(
        prompts.arc,
        f"'question', 'choices', 'answerKey' or {_COMMON}",
        ("eval/arc/ARC-Easy-Test.jsonl", "eval/llm_foundry/arc_easy.jsonl"),
        HubName("allenai/ai2_arc", "ARC-Easy", "test"),
    ),
    "arc_challenge": _Task(
        prompts.arc,
        f"'question', 'choices', 'answerKey' or {_COMMON}",
        ("eval/arc/ARC-Challenge-Test.jsonl", "eval/llm_foundry/arc_challenge.jsonl"),
        HubName("allenai/ai2_arc", "ARC-Challenge", "test"),
    ),
    "piqa": _Task(
        prompts.piqa,
        f"'goal', 'sol1', 'sol2', 'label' or {_COMMON}",
        ("eval/llm_foundry/piqa.jsonl",),
        HubName("baber/piqa", None, "validation"),
    ),
    "winogrande": _Task(
        prompts.winogrande,
        "'sentence', 'option1', 'option2', 'answer' or 'context_options', 'continuation', 'gold'",
        ("eval/llm_foundry/winogrande.jsonl",),
        HubName("allenai/winogrande", "winogrande_xl", "validation"),
    ),
    "lambada": _Task(
        prompts.lambada,
        "'text' or 'context', 'continuation'",
        ("eval/lambada/lambada_test.jsonl", "eval/llm_foundry/lambada_openai.jsonl"),
        HubName("EleutherAI/lambada_openai", "default", "test"),
    ),
}
_MMLU = "eval/mmlu"
_MMLU_HUB = HubName("cais/mmlu", "all")
NAMES = (*_TASKS, "mmlu")


def load(
    name: str, where: Path | None = None, limit: int | None = None, shots: int | None = None
) -> list[Question]:
    """The first `limit` questions of a task (None: all); of MMLU from all subjects by turns.

    where: a file, or a folder with the task's files by the names that they have below
    $GPTSMITH_DATA, which is the default before the Hugging Face Hub. shots: worked examples before
    each question of MMLU (default SHOTS). ValueError with file and line for a row that is no
    question of this task; FileNotFoundError says which file to put where.
    """
    if name not in NAMES:
        raise ValueError(f"no task {name!r}: choose among {', '.join(NAMES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} questions: give 1 or more")
    if name == "mmlu":
        questions = list(islice(_mmlu(where, SHOTS if shots is None else shots), limit))
    else:
        questions = [_question(name, row) for row in islice(_rows(name, where), limit)]
    if not questions:
        raise ValueError(f"{name}: no questions in {where or 'its files'}")
    return questions


def _rows(name: str, where: Path | None) -> Iterator[Row]:
    task = _TASKS[name]
    folder = where or _data_folder()
    if folder is not None and not folder.is_dir():
        return read_rows(folder)
    if folder is not None:
        for pattern in (*task.local, *(Path(pattern).name for pattern in task.local)):
            if found := sorted(folder.glob(pattern)):
                return read_rows(found[0])
    if where is not None:
        raise FileNotFoundError(
            f"{where}: {name} is not here as {' or '.join(task.local)}; name its file"
        )
    return _hub_rows(task.hub, task.local[0])


def _question(name: str, row: Row) -> Question:
    task = _TASKS[name]
    made = task.question(row)
    if made is None:
        raise ValueError(
            f"{row.place}: no question of {name}: it has {listed(row.values)},"
            f" expected are {task.columns}"
        )
    choices, answer = made
    if not 0 <= answer < len(choices):
        raise ValueError(f"{row.place}: its answer is none of the {len(choices)} choices")
    return Question(_id(row), choices, answer)


def _id(row: Row) -> str:
    own = row.values.get("id", row.values.get("ind"))
    return Path(row.place).name if own is None else str(own)


def _data_folder() -> Path | None:
    root = os.environ.get("GPTSMITH_DATA")
    return Path(root) if root and Path(root).is_dir() else None


def _hub_rows(hub: HubName, local: str) -> Iterator[Row]:
    remedy = f"without network, put {local} into a folder and set GPTSMITH_DATA to it"
    revision = corpora.hub_revision(hub, remedy)
    return corpora.hub_rows(hub, revision)


# --- MMLU ----------------------------------------------------------------------------------------


def _mmlu(where: Path | None, shots: int) -> Iterator[Question]:
    """The first question of each subject, the second of each, ...: any number is a fair sample."""
    if shots < 0:
        raise ValueError(f"{shots} worked examples: give 0 or more")
    examples = _mmlu_split(where, "dev") if shots else {}
    subjects = []
    for subject, rows in _mmlu_split(where, "test").items():
        shown = examples.get(subject, [])[:shots]
        if len(shown) < shots:
            raise ValueError(
                f"mmlu: {len(shown)} worked examples of {subject} in dev, {shots} wanted"
            )
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        stem = about + "".join(f"{text} {letter}\n\n" for _, text, letter in shown)
        subjects.append(
            [
                Question(
                    _id(row),
                    tuple((stem + text, f" {letter}") for letter in LETTERS),
                    LETTERS.index(answer),
                )
                for row, text, answer in rows
            ]
        )
    return (q for questions in zip_longest(*subjects) for q in questions if q is not None)


def _mmlu_split(where: Path | None, split: str) -> dict[str, list[tuple[Row, str, str]]]:
    """Rows with their prompts and letters, by subject."""
    subjects = defaultdict(list)
    for name, row in _mmlu_rows(where, split):
        made = prompts.mmlu(row)
        if made is None:
            raise ValueError(
                f"{row.place}: no question of mmlu: it has {listed(row.values)},"
                " expected are 'question', 'choices', 'answer'"
            )
        subjects[str(row.values.get("subject", name)).replace("_", " ")].append((row, *made))
    return subjects


def _mmlu_rows(where: Path | None, split: str) -> Iterator[tuple[str, Row]]:
    """Rows with the subject that their file is named after."""
    folder = where or _data_folder()
    for place in (folder, folder / _MMLU, folder / "mmlu") if folder else ():
        if (place / split).is_dir():
            for file in row_files(place / split):
                subject = re.sub(rf"_{split}$", "", file.name.partition(".")[0])
                rows = read_rows(file, header=("question", *LETTERS, "answer"))
                yield from ((subject, row) for row in rows)
            return
    if where is not None:
        raise FileNotFoundError(f"{where}: no folder {split} with MMLU's files in it")
    hub = _MMLU_HUB._replace(split=split)
    yield from (("", row) for row in _hub_rows(hub, f"{_MMLU}/{split}/SUBJECT_{split}.csv"))
