"""Pretraining: a corpus and an architecture in, a run folder out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from gptsmith.model import masks
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_scored
from gptsmith.recipes import corpus as corpora
from gptsmith.recipes import loop, options
from gptsmith.recipes.corpus import CorpusConfig
from gptsmith.run import Run


class PretrainConfig(CorpusConfig):
    """Train a model from scratch on a prepared corpus."""

    pad_vocab_multiple: int = Field(1, ge=1)
    """Round the model's vocabulary up to a multiple of this (64 is faster on GPUs)."""
    model: ModelConfig = ModelConfig.preset("fast")


def main(argv: Sequence[str], started: float | None = None) -> int:
    """`gptsmith pretrain [RECIPE.yaml] --data CORPUS --out RUN [--section.field VALUE]`.

    started: see `pretrain`; default the start of the command.
    """
    return options.command("pretrain", PretrainConfig, pretrain, argv, started)


def pretrain(config: PretrainConfig, started: float | None = None) -> int:
    """Train as the config says; returns the exit code, 0 or STOPPED.

    started: time.perf_counter() from which `seconds` counts. Raises ValueError for a corpus or a
    configuration that cannot be trained, before anything is written.
    """
    corpus = corpora.open_corpus(config)
    vocab = -(-corpus.tokenizer.vocab_size // config.pad_vocab_multiple) * config.pad_vocab_multiple
    config = config.model_copy(update=dict(model=config.model.change(vocab_size=vocab)))
    T = config.model.context_length
    mask_folder = config.out if config.resume else Path()  # a run keeps a copy of a mask's file
    mask = masks.parse(config.model.mask, folder=mask_folder, trust_code=True)
    start = first_scored(mask, T, config.model.n_head, config.model.n_layer)
    rows = corpora.windows(config, corpus, T, start)
    config, plan, notes = loop.resolve(config, config.model, rows)
    notes.insert(1, corpora.size_note(corpus))
    torch.manual_seed(config.train.seed)
    model = GPTModel(config.model, mask_folder=mask_folder, trust_code=True)
    model.to(config.train.device).activation_checkpointing = config.train.activation_checkpointing
    task, remarks = corpora.task(config, corpus, rows, model)
    run = Run.create(
        config.out, config.model_dump(mode="json"), config.model, corpus.tokenizer, config.resume,
        corpus=corpus.fingerprint, fixed=("document_mask", "pad_vocab_multiple", *loop.FIXED),
    )  # fmt: skip
    return loop.train(run, task, config, plan, [*notes, *remarks], started)
