"""Options of evaluation and classification. Nothing here needs torch, so that help and option
errors are immediate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, HttpUrl, field_validator

from gptsmith.config import Section
from gptsmith.data.options import FileFormat, LabelledFiles, OnError
from gptsmith.evaluate.multiple_choice import TASKS as MULTIPLE_CHOICE
from gptsmith.evaluate.multiple_choice import is_path
from gptsmith.flags import nearest
from gptsmith.run.options import TextWeightOptions, WeightOptions
from gptsmith.train.options import PrecisionName

TASKS = ("perplexity", "skills", *MULTIPLE_CHOICE, "gsm8k", "text", "judge", "classify")


class JudgeOptions(Section):
    """The judge model, and where it is served."""

    url: HttpUrl = HttpUrl("http://localhost:11434")
    """URL of Ollama, or of any server with OpenAI's chat completions (https://HOST/v1)."""
    model: str | None = None
    """Name of the model at that server."""
    protocol: Literal["auto", "openai", "ollama"] = "auto"
    """auto: Ollama's on port 11434 and for URLs that end in /api/chat, else OpenAI's."""
    key_variable: str | None = None
    """Name of the environment variable that holds the API key, if the server needs one."""
    parallel: int = Field(4, ge=1, le=64)
    """Concurrent requests."""
    timeout: float = Field(120, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(5, ge=0, le=20)
    """Further attempts when the server is busy, fails or is not reachable."""
    num_ctx: int = Field(8192, ge=512)
    """Ollama: context in tokens; longer prompts are not judged."""


class EvaluateOptions(TextWeightOptions, LabelledFiles):
    """Measure a trained model."""

    tasks: tuple[str, ...] = Field(
        (),
        description="perplexity (the default) on a corpus or text; skills: held-out items of the"
        f" built-in chat set; multiple choice: {', '.join(MULTIPLE_CHOICE)}, or a file of"
        " questions, choices and answers; gsm8k; text and judge: the responses that `finetune"
        " instruct` wrote; classify (the default of a classifier): labelled texts. Separated by"
        " commas, or repeated.",
    )
    limit: int | None = Field(None, ge=1)
    """Use only the first LIMIT questions of a task (mmlu: of all subjects in turn); perplexity:
    LIMIT windows, evenly spaced."""
    compare: Path | None = None
    """Another run to compare with: table and chart show both on their common items, with the
    difference and its 95% interval."""
    out: Path | None = None
    """Write the results to this .json file, with every item (.items.jsonl) and a chart."""
    data: str | None = None
    """perplexity: a prepared corpus (its validation split is used), or any text that `prepare`
    reads (all of it is used). Default: the corpus that the run was trained on. classify: labelled
    texts, read as `finetune classify` reads them."""
    on_error: OnError = "stop"
    """classify, files of questions: on a row that cannot be used, stop with an error, or skip and
    count it."""
    window: int | None = Field(None, ge=2)
    """perplexity: tokens of a window (default: the model's context, at most 2048)."""
    stride: int | None = Field(None, ge=1)
    """perplexity: tokens from one window to the next (default: a whole window). Each token is
    predicted once, from at least window - stride tokens before it."""
    batch_size: int | None = Field(None, ge=1)
    """perplexity: windows per batch (default: 8192 tokens)."""
    precision: PrecisionName = "auto"
    """perplexity: number format of matrix products; auto uses that of the run's training."""
    task_data: Path | None = None
    """File or folder with a task's questions (default: $GPTSMITH_DATA, else the Hub)."""
    first_choice: int | None = Field(None, ge=0, le=1)
    """Files of questions: number of the first choice (0 or 1), if the numeric answers leave it
    open."""
    shots: int | None = Field(None, ge=0)
    """mmlu, gsm8k: worked examples before a question (default: 5; gsm8k of a chat model: 0)."""
    per_skill: int = Field(50, ge=1)
    """skills: questions per skill (of some everyday turns there are only three to five)."""
    responses: Path | None = None
    """text, judge: file of responses with references (default: the run's responses.json)."""
    judge: JudgeOptions = JudgeOptions()

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        separated = ([p] if os.path.exists(p) else p.split(",") for p in map(str, parts))
        names = [name.strip() for part in separated for name in part]
        for name in names:
            if name not in TASKS and not is_path(name):
                near = nearest(name, TASKS)
                known = f"choose from {', '.join(TASKS)}, or name a file of questions"
                hint = f"did you mean {near!r}?" if near else known
                raise ValueError(f"no task {name!r}: {hint}")
        return tuple(dict.fromkeys(names))


class ClassifyOptions(WeightOptions, FileFormat):
    """Classify texts with a model that `finetune classify` made."""

    run: Path
    """A run folder, if the first argument does not name one."""
    text: tuple[str, ...] = ()
    """Texts to classify; `-` reads one from standard input."""
    file: Path | None = None
    """Texts in a table (csv, tsv, json, jsonl, parquet, arrow), or the lines of any other file."""
    text_column: str | None = None
    """Column of the text, if it is not obvious."""
    out: Path | None = None
    """Predictions for `file`, as .csv or .jsonl: its columns, the class, and each probability
    (default: JSON lines on standard output)."""
    batch_size: int = Field(32, ge=1)
    """Texts per batch."""
    precision: PrecisionName = "fp32"
    """Number format of matrix products."""
