"""What `gptsmith evaluate` can be asked."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from gptsmith.commands.weights import WeightOptions
from gptsmith.evaluate.multiple_choice import TASKS
from gptsmith.evaluate.options import JudgeOptions
from gptsmith.flags import nearest
from gptsmith.train.options import PrecisionName

NAMES = ("perplexity", "skills", *TASKS, "gsm8k", "text", "judge")


class EvaluateOptions(WeightOptions):
    """What to measure, and on what."""

    tasks: tuple[str, ...] = ("perplexity",)
    """perplexity on a corpus or text; skills: held-out items of the built-in chat set; hellaswag,
    hellaswag_gpt2, arc_easy, arc_challenge, piqa, winogrande, lambada, mmlu: multiple choice;
    gsm8k; text and judge: the answers that `finetune instruct` wrote. With commas, or repeated."""
    limit: int | None = Field(None, ge=1)
    """Only so many questions of a task, the first (mmlu: of all subjects by turns); perplexity:
    windows, evenly from the whole."""
    compare: Path | None = None
    """Another run, measured in the same way; a chart shows both."""
    out: Path | None = None
    """Write the results to this .json file; beside it every item (.items.jsonl) and a chart."""
    data: str | None = None
    """perplexity: a prepared corpus (its validation split is scored), or any text that `prepare`
    takes (all of it is). Default: the corpus that the run was trained on."""
    text_column: str | None = None
    """perplexity: the column of a table that holds the text (default: text, or the only one)."""
    window: int | None = Field(None, ge=2)
    """perplexity: tokens that the model sees at once (default: its context, at most 2048)."""
    stride: int | None = Field(None, ge=1)
    """perplexity: tokens from one window to the next (default: a window, they are disjoint); each
    token is scored once, behind at least window - stride others."""
    batch_size: int | None = Field(None, ge=1)
    """perplexity: windows that go through the model at once (default: 8192 tokens)."""
    precision: PrecisionName = "auto"
    """perplexity: number format of matrix products; auto takes that of the run's training."""
    task_data: Path | None = None
    """File or folder of a task's questions (default: $GPTSMITH_DATA, else the Hub)."""
    shots: int | None = Field(None, ge=0)
    """mmlu, gsm8k: worked examples before a question (default: 5; of gsm8k none for a chat
    model)."""
    per_skill: int = Field(50, ge=1)
    """skills: questions for each."""
    responses: Path | None = None
    """text, judge: file of answers with their references (default: the run's responses.json)."""
    judge: JudgeOptions = JudgeOptions()

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        names = [name.strip() for part in parts for name in str(part).split(",")]
        for name in names:
            if name not in NAMES:
                near = nearest(name, NAMES)
                hint = f"did you mean {near!r}?" if near else f"there are {', '.join(NAMES)}"
                raise ValueError(f"no task {name!r}: {hint}")
        return tuple(dict.fromkeys(names))
