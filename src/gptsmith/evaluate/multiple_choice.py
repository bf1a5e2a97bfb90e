"""Multiple-choice tasks: one record each, with prompts worded as in lm-evaluation-harness 0.4.13.

To add a task, add a record to TASKS. Its `question` function turns a row into a question. The
docstrings name the columns, which are those of the Hugging Face Hub; some functions also accept the
rows of llm-foundry or of the original release.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from gptsmith.evaluate.task_data import find, hub_rows, label, question_rows, text, texts

if TYPE_CHECKING:
    from gptsmith.data.options import FileFormat
    from gptsmith.data.report import ReadReport
    from gptsmith.data.row import Row

Choices = tuple[tuple[str, str], ...]
LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """A question; the model's answer is the choice whose continuation is most likely.

    id: the row's own, else file:line. choices: pairs of context and continuation; a continuation
    starts with the space between the two. answer: index of the correct choice.
    """

    id: str
    choices: Choices
    answer: int


@dataclass(frozen=True)
class Task:
    """A multiple-choice task: where its questions are, their prompts, and the reported metrics."""

    name: str
    question: Callable[[Row], tuple[Choices, int]]
    """Choices and the index of the correct one. ValueError naming file and line for a bad row."""
    files: tuple[str, ...]
    """Patterns below a data folder, of which the first match is read; folders if `shots` is set."""
    hub: tuple[str, str | None, str]
    """Name, configuration and split on the Hugging Face Hub."""
    metrics: tuple[str, ...] = ("acc", "acc_norm", "acc_token")
    """Reported metrics: accuracy with different normalisations, perplexity (see accuracy.py)."""
    main_metric: str = "acc_norm"
    """The metric that is usually quoted for the task, and plotted during training."""
    gpt2: Mapping[str, float] = field(default_factory=dict)
    """Published scores of GPT-2 124M, by metric."""
    shots: int = 0
    """Worked examples before each question, from the split `dev` of the same subject."""
    preamble: str = ""
    """Before the worked examples; {subject} is replaced."""
    notes: tuple[str, ...] = ()
    """Notes on a custom file of questions, for the user."""


# --- rows to questions ---------------------------------------------------------------------------


def _hellaswag(row: Row) -> tuple[Choices, int]:
    """ctx_a, ctx_b, activity_label, endings (list), label (0 to 3)."""
    sentences = f"{text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}"
    context = _without_markup(f"{text(row, 'activity_label')}: {sentences}")
    endings = map(_without_markup, texts(row, "endings"))
    return _same_context(context, endings), label(row, "label")


def _without_markup(wikihow: str) -> str:
    wikihow = wikihow.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", wikihow).replace("  ", " ")


def _hellaswag_gpt2(row: Row) -> tuple[Choices, int]:
    """ctx, endings, label: the same files, asked as in Karpathy's build-nanogpt."""
    return _same_context(text(row, "ctx"), texts(row, "endings")), label(row, "label")


def _arc(row: Row) -> tuple[Choices, int]:
    """question, choices {text: [...], label: [...]}, answerKey."""
    if "query" in row.values:
        return _llm_foundry(row)
    question, choices = row.values, row.values.get("choices")
    if isinstance(nested := row.values.get("question"), dict):  # the original files of AI2
        question = {"question": nested.get("stem")}
        rows = [one for one in nested.get("choices") or () if isinstance(one, dict)]
        choices = {key: [one.get(key) for one in rows] for key in ("text", "label")}
    if not isinstance(choices, dict):
        raise ValueError(f"{row.place}: 'choices' is {choices!r:.40}, not texts and labels")
    labels, key = texts(row, "label", choices), text(row, "answerKey")
    context = f"Question: {text(row, 'question', question)}\nAnswer:"
    answer = labels.index(key) if key in labels else -1
    return _same_context(context, texts(row, "text", choices)), answer


def _piqa(row: Row) -> tuple[Choices, int]:
    """goal, sol1, sol2, label (0 or 1)."""
    if "query" in row.values:
        return _llm_foundry(row)
    context = f"Question: {text(row, 'goal')}\nAnswer:"
    return _same_context(context, (text(row, "sol1"), text(row, "sol2"))), label(row, "label")


def _llm_foundry(row: Row) -> tuple[Choices, int]:
    """llm-foundry's query ("Question: ..."), choices (list), gold (0 for the first)."""
    context = text(row, "query").removesuffix("\n") + "\nAnswer:"  # PIQA's end in a line feed
    return _same_context(context, texts(row, "choices")), label(row, "gold")


def _winogrande(row: Row) -> tuple[Choices, int]:
    """sentence (with a _ for the choice), option1, option2, answer (1 or 2).

    The choices end the contexts and share the continuation (Trinh and Le 2018).
    llm-foundry's form: context_options (list), continuation, gold (0 or 1).
    """
    if "context_options" in row.values:
        contexts = texts(row, "context_options")
        rest, answer = text(row, "continuation"), label(row, "gold")
    else:
        before, gap, rest = text(row, "sentence").partition("_")
        if not gap:
            raise ValueError(f"{row.place}: 'sentence' has no _ in the place of the choice")
        contexts = [before + text(row, name) for name in ("option1", "option2")]
        rest, answer = rest.strip(), label(row, "answer") - 1
    return tuple((context, f" {rest}") for context in contexts), answer


def _lambada(row: Row) -> tuple[Choices, int]:
    """text, whose last word is to be predicted; llm-foundry's form: context, continuation."""
    if "continuation" in row.values:
        context, word = text(row, "context"), text(row, "continuation")
    else:
        context, _, word = text(row, "text").rpartition(" ")
    if not (context.strip() and word.strip()):
        raise ValueError(f"{row.place}: no last word after a text")
    return _same_context(context, (word,)), 0


def _mmlu(row: Row) -> tuple[Choices, int]:
    """question, choices (list of four), answer (0 to 3); or a row of the original csv files."""
    if "choices" in row.values:
        choices, answer = texts(row, "choices"), label(row, "answer")
    else:
        choices, letter = [text(row, name) for name in LETTERS], text(row, "answer")
        answer = LETTERS.index(letter) if letter in LETTERS else -1
    letters = LETTERS[: len(choices)]
    options = "".join(f"{a}. {b}\n" for a, b in zip(letters, choices, strict=False))
    return _same_context(f"{text(row, 'question').strip()}\n{options}Answer:", letters), answer


def _same_context(context: str, continuations: Iterable[str]) -> Choices:
    return tuple((context, f" {continuation}") for continuation in continuations)


# --- the tasks -----------------------------------------------------------------------------------

_HELLASWAG_FILES = ("hellaswag/hellaswag_val*.jsonl",)
_HELLASWAG_HUB = ("Rowan/hellaswag", None, "validation")

TASKS = {
    task.name: task
    for task in (
        # GPT-2 124M on the 10,042 validation questions: acc and acc_norm by lm-evaluation-harness,
        # acc_token by Karpathy's build-nanogpt.
        Task(
            "hellaswag", _hellaswag, _HELLASWAG_FILES, _HELLASWAG_HUB,
            gpt2={"acc": 0.2892, "acc_norm": 0.3114},
        ),
        Task(
            "hellaswag_gpt2", _hellaswag_gpt2, _HELLASWAG_FILES, _HELLASWAG_HUB,
            main_metric="acc_token", gpt2={"acc_token": 0.294},
        ),
        Task(
            "arc_easy", _arc,
            ("eval/arc/ARC-Easy-Test.jsonl", "eval/llm_foundry/arc_easy.jsonl"),
            ("allenai/ai2_arc", "ARC-Easy", "test"),
        ),
        Task(
            "arc_challenge", _arc,
            ("eval/arc/ARC-Challenge-Test.jsonl", "eval/llm_foundry/arc_challenge.jsonl"),
            ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ),
        Task(
            "piqa", _piqa,
            ("eval/llm_foundry/piqa.jsonl", "piqa/valid.jsonl", "physicaliqa-train-dev/dev.jsonl"),
            ("baber/piqa", None, "validation"),
        ),
        # Where all choices have one text or one letter, no normalisation changes the answer.
        Task(
            "winogrande", _winogrande, ("eval/llm_foundry/winogrande.jsonl",),
            ("allenai/winogrande", "winogrande_xl", "validation"),
            metrics=("acc",), main_metric="acc",
        ),
        Task(
            "lambada", _lambada,
            ("eval/lambada/lambada_test.jsonl", "eval/llm_foundry/lambada_openai.jsonl"),
            ("EleutherAI/lambada_openai", "default", "test"),
            metrics=("acc", "perplexity"), main_metric="acc",
        ),
        Task(
            "mmlu", _mmlu, ("eval/mmlu", "mmlu"), ("cais/mmlu", "all", "test"),
            metrics=("acc",), main_metric="acc", shots=5,
            preamble="The following are multiple choice questions (with answers) about {subject}."
            "\n\n",
        ),
    )
}  # fmt: skip


# --- reading -------------------------------------------------------------------------------------


def load_task(
    name: str,
    where: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    *,
    report: ReadReport | None = None,
    form: FileFormat | None = None,
    first_choice: int | None = None,
) -> tuple[Task, list[Question]]:
    """A task by its name, or a file of questions as a task, and the first `limit` questions (None:
    all); of MMLU, the subjects take turns.

    where: a file (.jsonl .json .csv .tsv, each also .gz, .parquet, .arrow), or a folder that has
    the task's file under its usual name. Default: $GPTSMITH_DATA, else the Hugging Face Hub.
    shots: worked examples, for tasks that show some (default: the task's own number).
    report, form, first_choice: of a file of questions (question_file.py).
    ValueError naming file and line for a bad row; FileNotFoundError says where to put which file.
    """
    if name in TASKS:
        task = TASKS[name]
        if task.shots:
            found = _with_examples(task, where, task.shots if shots is None else shots)
        else:
            found = (_question(task, row) for row in _rows(task, where))
        questions = list(islice(found, limit))
    elif is_path(name):
        task, questions = _file_task(Path(name), report, form, first_choice)
        questions = questions[:limit]
    else:
        raise ValueError(f"no task {name!r}: choose among {', '.join(TASKS)}, or name a file")
    if not questions:
        raise ValueError(f"{name}: no questions in {where or 'its files'}")
    return task, _with_unique_ids(questions)


def is_path(name: str) -> bool:
    """Whether the name of a task is meant to be a file of questions."""
    return bool(Path(name).suffix) or "/" in name or os.path.exists(name)


def load(
    name: str, where: Path | None = None, limit: int | None = None, shots: int | None = None
) -> list[Question]:
    """The questions of `load_task`."""
    return load_task(name, where, limit, shots)[1]


def _file_task(
    path: Path, report: ReadReport | None, form: FileFormat | None, first_choice: int | None
) -> tuple[Task, list[Question]]:
    from gptsmith.data.report import ReadReport
    from gptsmith.evaluate.question_file import read_questions

    found, notes = read_questions(path, report or ReadReport(), form, first_choice)
    questions = [Question(q.id, _same_context(q.question, q.choices), i) for q, i in found]
    # The prompt is that of ARC.
    return replace(TASKS["arc_easy"], name=str(path), notes=tuple(notes)), questions


def _with_unique_ids(questions: Sequence[Question]) -> list[Question]:
    """Number ids that occur repeatedly, since items of two runs are matched by id."""
    seen: Counter[str] = Counter()
    unique = []
    for question in questions:
        seen[question.id] += 1
        number = seen[question.id]
        unique.append(replace(question, id=f"{question.id} ({number})") if number > 1 else question)
    return unique


def _question(task: Task, row: Row) -> Question:
    choices, answer = task.question(row)
    if not 0 <= answer < len(choices):
        raise ValueError(f"{row.place}: the answer is none of the {len(choices)} choices")
    own_id = row.values.get("id", row.values.get("ind"))
    return Question(Path(row.place).name if own_id is None else str(own_id), choices, answer)


def _rows(task: Task, where: Path | None) -> Iterator[Row]:
    found = where
    if found is None or found.is_dir():
        found = find(task.name, where, [*task.files, *(Path(name).name for name in task.files)])
    return question_rows(found) if found else hub_rows(task.hub, task.files[0])


def _with_examples(task: Task, where: Path | None, shots: int) -> Iterator[Question]:
    """Each question after `shots` worked examples of its subject.

    The first question of each subject, then the second of each, ...: the first n questions are a
    fair sample for any n.
    """
    examples = _by_subject(task, where, "dev") if shots else {}
    subjects = []
    for subject, questions in _by_subject(task, where, "test").items():
        shown = examples.get(subject, [])[:shots]
        if len(shown) < shots:
            raise ValueError(
                f"{task.name}: {len(shown)} worked examples of {subject} in dev, {shots} wanted"
            )
        solved = ["".join(example.choices[example.answer]) + "\n\n" for example in shown]
        prefix = task.preamble.format(subject=subject) + "".join(solved)
        subjects.append([
            replace(question, choices=tuple((prefix + c, text) for c, text in question.choices))
            for question in questions
        ])  # fmt: skip
    return (q for questions in zip_longest(*subjects) for q in questions if q is not None)


def _by_subject(task: Task, where: Path | None, split: str) -> dict[str, list[Question]]:
    """The questions of a split by subject, which is a column or, if there is none, part of the file
    name (anatomy_test.csv)."""
    from gptsmith.data.rows import read_rows

    found = find(task.name, where, [f"{name}/{split}" for name in (*task.files, ".")])
    if found:
        rows = read_rows(found, header=("question", *LETTERS, "answer"))
    else:
        name, config, _ = task.hub
        rows = hub_rows((name, config, split), f"{task.files[0]}/{split}/SUBJECT_{split}.csv")
    subjects = defaultdict(list)
    for row in rows:
        file = Path(row.place).name.partition(".")[0].removesuffix(f"_{split}")
        subject = str(row.values.get("subject", file)).replace("_", " ")
        subjects[subject].append(_question(task, row))
    return subjects
