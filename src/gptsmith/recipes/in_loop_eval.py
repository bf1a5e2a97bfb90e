"""Multiple-choice tasks that are evaluated during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptsmith.evaluate import accuracy
from gptsmith.evaluate.multiple_choice import Question, Task, load_task
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.options import EvalConfig
from gptsmith.recipes.plan import Note
from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskEvaluation:
    """A function without arguments that returns all scores by name (hellaswag_acc_token)."""

    model: GPTModel
    tokenizer: Tokenizer
    tasks: Sequence[tuple[Task, Sequence[Question]]]

    def __call__(self) -> Mapping[str, float]:
        results = [
            accuracy.score(self.model, self.tokenizer, task, questions)
            for task, questions in self.tasks
        ]
        return {f"{r.task}_{metric}": value for r in results for metric, value in r.metrics.items()}

    @property
    def references(self) -> dict[str, dict[str, float]]:
        """The metric of each task to draw over the steps, with reference values such as chance."""
        known = ((task, accuracy.references(task, questions)) for task, questions in self.tasks)
        return {f"{t.name}_{t.main_metric}": found[t.main_metric] for t, found in known}


def prepare(
    config: EvalConfig, model: GPTModel, tokenizer: Tokenizer
) -> tuple[TaskEvaluation | None, list[Note]]:
    """The evaluation of eval.tasks (None if there are none), and notes on the questions.

    The questions are read now: ValueError or FileNotFoundError if they are missing, damaged or too
    long.
    """
    tasks = []
    notes = []
    for name in dict.fromkeys(config.tasks):
        task, questions = load_task(name, config.task_data, config.task_items)
        selected, found = accuracy.select(model, tokenizer, name, questions)
        tasks.append((task, [question for question, _ in selected]))
        notes += [Note("evaluation", text) for text in (*task.notes, *found)]
    return (TaskEvaluation(model, tokenizer, tasks) if tasks else None), notes
