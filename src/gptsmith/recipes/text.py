"""Continued pretraining: a trained model and a corpus in, a model that knows this kind of text out.

A model that has read much of anything, tuned on a domain's raw text before it is tuned on its task,
does the task better (Howard & Ruder 2018, "ULMFiT"; Gururangan et al. 2020, "Don't stop
pretraining").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from gptsmith.model.target_leakage import first_scored
from gptsmith.recipes import corpus as corpora
from gptsmith.recipes import finetune, loop, options
from gptsmith.recipes.corpus import CorpusConfig
from gptsmith.recipes.finetune import FinetuneConfig


class TextConfig(FinetuneConfig, CorpusConfig):
    """Go on with the training of a model, on another corpus."""

    default_epochs: ClassVar[float] = 1

    data: Path
    """Corpus made by `gptsmith prepare --tokenizer RUN`."""
    context_length: int | None = Field(None, ge=2)
    """Tokens of a row (default: the model's context)."""


def main(argv: Sequence[str], started: float | None = None) -> int:
    """`gptsmith finetune text [RECIPE.yaml] --from RUN --data CORPUS --out RUN2`."""
    return options.command("finetune text", TextConfig, text, argv, started)


def text(config: TextConfig, started: float | None = None) -> int:
    """Train as the config says; returns the exit code, 0 or loop.STOPPED."""
    corpus = corpora.open_corpus(config)
    source = finetune.origin(config)
    if corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
        raise ValueError(
            f"{config.data} was not made with the tokenizer of {source.path}: prepare it again "
            f"with --tokenizer {source.path}"
        )
    begin = finetune.start(config, source)
    T = finetune.longest(config.context_length, begin)
    shape = begin.model.config
    start = first_scored(begin.model.mask, T, shape.n_head, shape.n_layer)
    rows = corpora.windows(config, corpus, T, start)
    config, plan, notes = finetune.resolve(config, begin, rows)
    notes.insert(2, corpora.size_note(corpus))
    task, remarks = corpora.task(config, corpus, rows, begin.model)
    run = finetune.create(
        config, begin, source, corpus=corpus.fingerprint, template=source.template,
        fixed=("document_mask", "context_length"),
    )  # fmt: skip
    return loop.train(run, task, config, plan, [*notes, *remarks], started)
