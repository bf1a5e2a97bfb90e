"""Pretraining: a corpus and an architecture in, a run folder out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field

from gptsmith import settings
from gptsmith.data.batches import Windows, validation_batches
from gptsmith.data.shards import Corpus
from gptsmith.evaluate.perplexity import evaluate
from gptsmith.generate.engine import generate_text
from gptsmith.generate.sample import SamplingConfig
from gptsmith.model import masks
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.leakage import first_scored
from gptsmith.recipes import exam, loop
from gptsmith.recipes.options import Recipe
from gptsmith.run import Run
from gptsmith.train import precision
from gptsmith.train.loss import next_token_loss, score_from
from gptsmith.train.monitor import command_start


class PretrainConfig(Recipe):
    """Train a model from scratch on a prepared corpus."""

    data: Path
    """Corpus made by `gptsmith prepare`."""
    document_mask: bool = False
    """A token attends to its own document only."""
    pad_vocab: int = Field(1, ge=1)
    """Round the model's vocabulary up to a multiple of this (64 is faster on GPUs)."""
    model: ModelConfig = ModelConfig.preset("fast")


def main(argv: Sequence[str], started: float | None = None) -> int:
    """`gptsmith pretrain [RECIPE.yaml] --data CORPUS --out RUN [--section.field VALUE]`.

    started: see `pretrain`; default the start of the command.
    """
    config = settings.load(
        PretrainConfig,
        Run.with_stored_recipe(argv),
        prog="gptsmith pretrain",
        description="Train a model from scratch on a prepared corpus.",
    )
    return pretrain(config, command_start() if started is None else started)


def pretrain(config: PretrainConfig, started: float | None = None) -> int:
    """Train as the config says; returns the exit code, 0 or STOPPED.

    started: time.perf_counter() from which `seconds` counts. Raises ValueError for a corpus or a
    configuration that cannot be trained, before anything is written.
    """
    try:
        corpus = Corpus.open(config.data)
    except FileNotFoundError as error:
        if not config.resume:
            raise
        raise FileNotFoundError(f"{error}; or, if it was moved, give --data") from None
    vocab = -(-corpus.tokenizer.vocab_size // config.pad_vocab) * config.pad_vocab
    config = config.model_copy(update=dict(model=config.model.change(vocab_size=vocab)))
    T, eos = config.model.context_length, None
    if config.document_mask:
        eos = corpus.tokenizer.eos_id
    mask_folder = config.out if config.resume else Path()  # a run keeps a copy of a mask's file
    mask = masks.parse(config.model.mask, folder=mask_folder, trust_code=True)
    start = first_scored(mask, T, config.model.n_head, config.model.n_layer)
    windows = Windows(corpus.train, T, config.train.seed, eos, start)
    config, plan, notes = loop.resolve(config, config.model, windows)
    notes.insert(
        1, f"data: {corpus.train_tokens:,} training tokens, {corpus.val_tokens:,} for validation"
    )
    device = torch.device(config.train.device)
    torch.manual_seed(config.train.seed)
    model = GPTModel(config.model, mask_folder=mask_folder, trust_code=True).to(device)
    model.recompute_activations = config.train.recompute_activations
    arithmetic = precision.choose(config.train.precision, device)
    token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes())

    def assess(limit: int | None) -> Mapping[str, float | int | None]:
        batches = validation_batches(corpus.val, T, 2 * config.train.batch_size, eos, limit)
        scored = (score_from(batch, start) for batch in batches)
        return evaluate(model, scored, arithmetic, token_bytes).fields()

    def texts() -> Iterator[tuple[str, str]]:
        """One continuation of the prompt, the same random stream each time."""
        if length := config.eval.sample_tokens:
            sampling, prompt = SamplingConfig(max_new_tokens=length), config.eval.prompt
            yield prompt, generate_text(model, corpus.tokenizer, [prompt], sampling)[0]

    questions, remarks = exam.prepare(config.eval, model, corpus.tokenizer)
    run = Run.create(
        config.out, config.model_dump(mode="json"), config.model, corpus.tokenizer, config.resume,
        corpus=corpus.fingerprint, fixed=("document_mask", "pad_vocab", *loop.FIXED),
    )  # fmt: skip
    task = loop.Task(model, next_token_loss, windows, assess, corpus.val_tokens, texts, questions)
    return loop.train(run, task, config, plan, [*notes, *remarks], started)
