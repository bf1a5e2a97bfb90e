"""Questions of multiple choice that a model is asked while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gptsmith.evaluate import accuracy
from gptsmith.evaluate.multiple_choice import TASKS, load
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
        name: load(name, config.task_data, config.task_items)
        for name in dict.fromkeys(config.tasks)
    }
    notes = [
        note
        for name, questions in asked.items()
        for note in accuracy.select(model, tokenizer, name, questions)[1]
    ]
    if not asked:
        return None, []

    def exam() -> Mapping[str, float]:
        found = [accuracy.score(model, tokenizer, TASKS[name], asked[name]) for name in asked]
        return {f"{r.task}_{metric}": value for r in found for metric, value in r.metrics.items()}

    return exam, notes


def levels(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metric of each task that is plotted over the steps, with scores to compare with."""
    tasks = [TASKS[name] for name in names]
    return {f"{t.name}_{t.main_metric}": t.references(t.main_metric) for t in tasks}
