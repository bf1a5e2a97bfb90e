"""Questions of multiple choice that a model is asked while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gptsmith.evaluate import choices, report, tasks
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.options import EvalConfig
from gptsmith.tokenizer import Tokenizer

Exam = Callable[[], Mapping[str, float]]


def prepare(
    config: EvalConfig, model: GPTModel, tokenizer: Tokenizer
) -> tuple[Exam | None, list[str]]:
    """A function that asks the questions of eval.tasks and returns all scores by name
    (hellaswag_acc_token ...), and what there is to say about them; None if there are none.

    The questions are read now. ValueError, FileNotFoundError if they cannot be, or do not fit.
    """
    asked = {
        name: tasks.load(name, config.task_data, config.task_items)
        for name in dict.fromkeys(config.tasks)
    }
    notes = [
        note
        for name, questions in asked.items()
        for note in choices.askable(model, tokenizer, name, questions)[1]
    ]
    if not asked:
        return None, []

    def exam() -> Mapping[str, float]:
        found = [choices.score(model, tokenizer, name, asked[name]) for name in asked]
        return {f"{r.task}_{metric}": value for r in found for metric, value in r.metrics.items()}

    return exam, notes


def levels(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The score of each task that is drawn over the steps, with chance and GPT-2 124M beside it as
    far as they are known."""
    return {f"{name}_{_drawn(name)}": dict(report.references(name, _drawn(name))) for name in names}


def _drawn(task: str) -> str:
    """The metric that the task is known by."""
    by_sum = dict.fromkeys(("winogrande", "mmlu", "lambada"), "acc")
    return {**by_sum, "hellaswag_gpt2": "acc_token"}.get(task, "acc_norm")
