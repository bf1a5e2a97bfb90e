"""Training a model to answer: what chat and instruction tuning share behind their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import Field

from gptsmith.chat_template import ChatTemplate
from gptsmith.data.examples import Examples
from gptsmith.data.packing import PackedRows, PaddedRows
from gptsmith.evaluate.perplexity import evaluate
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.recipes import finetune, in_loop_eval, loop
from gptsmith.recipes.finetune import FinetuneConfig, Start
from gptsmith.run import Run
from gptsmith.train import runtime
from gptsmith.train.loss import next_token_loss


class AnswersConfig(FinetuneConfig):
    """Rows of examples."""

    context_length: int | None = Field(None, ge=2)
    """Tokens of a row (default: the model's context)."""
    pack: bool = True
    """Several examples per row, none of which sees another; else one and padding."""


def tune(
    config: AnswersConfig,
    source: Run,
    begin: Start,
    template: ChatTemplate,
    T: int,
    train: Examples,
    val: Examples,
    asked: Sequence[Sequence[int]],
    notes: Sequence[str],
    *,
    fixed: Sequence[str] = (),
    started: float | None = None,
) -> int:
    """Tune on `train`; returns the exit code, 0 or loop.STOPPED.

    source, begin: see finetune. T: tokens of a row (finetune.row_length). asked: prompts that the
    model answers at each evaluation. notes: what there is to say about the data. fixed: see
    Run.create. started: see loop.train.
    """
    model, tokenizer = begin.model, begin.tokenizer
    seed, pad_id = config.train.seed, begin.pad_id
    samples, held_out = (
        PackedRows(part, T, seed, pad_id) if config.pack else PaddedRows(part, T, seed, pad_id)
        for part in (train, val)
    )
    config, plan, more = finetune.resolve(config, begin, samples)
    if isinstance(samples, PaddedRows):
        samples.fixed = config.train.compile == "on"  # one shape, one graph
    arithmetic = runtime.choose_precision(config.train.precision, torch.device(config.train.device))
    token_bytes = torch.from_numpy(tokenizer.token_bytes())

    def assess(limit: int | None) -> Mapping[str, float | int | None]:
        batches = held_out.validation(2 * config.train.batch_size, limit)
        return evaluate(model, batches, arithmetic, token_bytes).fields()

    def texts() -> Iterator[tuple[str, str]]:
        if length := config.eval.sample_tokens:
            greedy = SamplingConfig(max_new_tokens=length, temperature=0)
            replies = Chat(model, tokenizer, template).reply_all(asked, greedy)
            for ids, reply in zip(asked, replies, strict=True):
                yield tokenizer.decode(ids), reply.text

    questions, remarks = in_loop_eval.prepare(config.eval, model, tokenizer)
    run = finetune.create(
        config, begin, source, template=template.source,
        corpus=train.fingerprint[:32] + val.fingerprint[:32],
        fixed=("pack", "context_length", *fixed),
    )  # fmt: skip
    task = loop.Task(model, next_token_loss, samples, assess, val.tokens, texts, questions)
    return loop.train(run, task, config, plan, [*notes, *more, *remarks], started)
