"""Multiple-choice tasks that are evaluated during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gptsmith.evaluate import accuracy
from gptsmith.evaluate.multiple_choice import TASKS, load
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.options import EvalConfig
from gptsmith.recipes.plan import Note
from gptsmith.tokenizer import Tokenizer

TaskEvaluation = Callable[[], Mapping[str, float]]


def prepare(
    config: EvalConfig, model: GPTModel, tokenizer: Tokenizer
) -> tuple[TaskEvaluation | None, list[Note]]:
    """A function that evaluates eval.tasks (None if there are none), and notes on the questions.

    The function returns all scores by name (hellaswag_acc_token). The questions are read now:
    ValueError or FileNotFoundError if they are missing, damaged or too long.
    """
    questions = {
        name: load(name, config.task_data, config.task_items)
        for name in dict.fromkeys(config.tasks)
    }
    notes = [
        Note("evaluation", text)
        for name, items in questions.items()
        for text in accuracy.select(model, tokenizer, name, items)[1]
    ]
    if not questions:
        return None, []

    def evaluate() -> Mapping[str, float]:
        results = [
            accuracy.score(model, tokenizer, TASKS[name], questions[name]) for name in questions
        ]
        return {f"{r.task}_{metric}": value for r in results for metric, value in r.metrics.items()}

    return evaluate, notes


def references(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metric of each task to draw over the steps, with reference values such as chance."""
    tasks = [TASKS[name] for name in names]
    return {f"{t.name}_{t.main_metric}": t.references(t.main_metric) for t in tasks}
