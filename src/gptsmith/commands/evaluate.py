"""`gptsmith evaluate RUN`: loss, perplexity, bits per byte and accuracy on a corpus, and how many
answers to the built-in chat set are right."""

import sys
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from rich.console import Console

from gptsmith import files, settings
from gptsmith.commands.weights import WeightOptions
from gptsmith.conversation import ChatTemplate
from gptsmith.data.batches import validation_batches
from gptsmith.data.shards import Corpus
from gptsmith.evaluate import perplexity, skills
from gptsmith.model.leakage import first_scored
from gptsmith.run import Run
from gptsmith.train.loss import score_from
from gptsmith.train.precision import Name, Precision, choose
from gptsmith.train.trackers import flatten

SEED = 0  # of the questions: the same ones each time


class EvaluateOptions(WeightOptions):
    """What to score."""

    data: Path | None = None
    """perplexity: corpus whose validation split is scored (default: the one that the run was
    trained on)."""
    batch_size: int = Field(32, ge=1)
    """perplexity: windows that go through the model at once."""
    precision: Name = "auto"
    """perplexity: number format of matrix products; auto takes that of the run's training."""
    tasks: tuple[Literal["perplexity", "skills"], ...] = ("perplexity",)
    """What is measured, repeatable: perplexity on a corpus; skills: right answers to held-out items
    of the built-in chat set, of a base model too."""
    per_skill: int = Field(50, ge=1)
    """Questions for each skill."""
    out: Path | None = None
    """Also write the results here, JSON."""


def main(argv: list[str]) -> None:
    options = settings.load(
        EvaluateOptions,
        argv,
        prog="gptsmith evaluate",
        description="Measure a trained model on the validation split of a corpus.",
        positional="run",
    )
    run = Run.open(options.run)
    results: dict[str, object] = {}
    for task in dict.fromkeys(options.tasks):
        measure = _perplexity if task == "perplexity" else _skills
        results[task] = measure(options, run)
    if options.out is not None:
        files.write_json(options.out, results)


def _skills(options: EvaluateOptions, run: Run) -> dict[str, skills.Scores]:
    model = options.load(run)
    if run.template is None:
        scores = skills.score_base(model, run.tokenizer, SEED, options.per_skill)
    else:
        template = ChatTemplate(run.template, run.tokenizer)
        scores = skills.score_chat(model, run.tokenizer, template, SEED, options.per_skill)
    print(f"{run.path} on {options.per_skill} questions a skill that training never shows")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(skills.table(scores))
    return scores


def _perplexity(options: EvaluateOptions, run: Run) -> dict[str, float | int | None]:
    arithmetic, why = _arithmetic(options, run)
    data = options.data or run.config.get("data")
    tuned = options.data is None and ("from" in run.config or run.model_config.labels)
    if tuned or not isinstance(data, str | Path):
        raise ValueError(
            f"{run.path} was not trained on a prepared corpus: give --data, or --tasks skills"
        )
    try:
        corpus = Corpus.open(data)
    except FileNotFoundError as error:
        if options.data is not None:
            raise
        raise FileNotFoundError(f"{run.path} was trained on {error}; or give --data") from None
    if corpus.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise ValueError(
            f"{corpus.path} was made with another tokenizer than {run.path}: prepare that text "
            f"with --tokenizer {run.path / 'tokenizer.json'}"
        )
    model, c = options.load(run), run.model_config
    start = first_scored(model.mask, c.context_length, c.n_head, c.n_layer)
    eos = corpus.tokenizer.eos_id if run.config.get("document_mask") else None
    batches = validation_batches(corpus.val, c.context_length, options.batch_size, eos)
    scored = (score_from(batch, start) for batch in batches)
    token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes())
    scores = perplexity.evaluate(model, scored, arithmetic, token_bytes)
    print(f"{run.path} on the validation split of {corpus.path}, {scores.tokens:,} tokens")
    print(f"  precision     {arithmetic.name}, {why}")
    print(f"  loss          {scores.loss:.4f} nats per token")
    print(f"  perplexity    {scores.perplexity:,.2f}")
    if scores.bits_per_byte is not None:
        print(f"  bits per byte {scores.bits_per_byte:.4f}")
    print(f"  next token    {scores.top1:.1%} guessed first, {scores.top5:.1%} in five guesses")
    return scores.fields()


def _arithmetic(options: EvaluateOptions, run: Run) -> tuple[Precision, str]:
    """The precision to measure in, and why that one."""
    device = options.where()
    if options.precision != "auto":
        return choose(options.precision, device), "as asked for"
    trained = flatten(run.config).get("train.precision", "fp32")
    if trained == "fp16" and device.type == "cpu":
        return choose("fp32", device), "because the fp16 of its training is for GPUs"
    return choose(trained, device), "as in training"
