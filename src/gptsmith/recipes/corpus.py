"""Training on a prepared corpus: what pretraining and its continuation share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from gptsmith.data.dataset import Windows, validation_batches
from gptsmith.data.shards import Corpus
from gptsmith.evaluate.perplexity import evaluate
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import in_loop_eval, loop
from gptsmith.recipes.options import Recipe
from gptsmith.train import runtime
from gptsmith.train.loss import next_token_loss


class CorpusConfig(Recipe):
    """Options of training on text."""

    data: Path
    """Corpus made by `gptsmith prepare`."""
    document_mask: bool = False
    """A token attends to its own document only."""


def open_corpus(config: CorpusConfig) -> Corpus:
    """The corpus; FileNotFoundError, with what to do on resume."""
    try:
        return Corpus.open(config.data)
    except FileNotFoundError as error:
        if not config.resume:
            raise
        raise FileNotFoundError(f"{error}; or, if it was moved, give --data") from None


def windows(config: CorpusConfig, corpus: Corpus, T: int, mask_targets_before: int) -> Windows:
    """Training rows of the corpus. mask_targets_before: model/target_leakage.py."""
    eos = corpus.tokenizer.eos_id if config.document_mask else None
    return Windows(corpus.train, T, config.train.seed, eos, mask_targets_before)


def size_note(corpus: Corpus) -> str:
    return f"data: {corpus.train_tokens:,} training tokens, {corpus.val_tokens:,} for validation"


def task(
    config: Recipe, corpus: Corpus, rows: Windows, model: GPTModel
) -> tuple[loop.Task, list[str]]:
    """What the loop needs, and remarks on eval.tasks. config: resolved; model: on its device."""
    corpus.tokenizer.encode(config.eval.prompt)  # what it cannot write is told now
    arithmetic = runtime.choose_precision(config.train.precision, torch.device(config.train.device))
    token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes())

    def assess(limit: int | None) -> Mapping[str, float | int | None]:
        batches = validation_batches(
            corpus.val, rows.T, 2 * config.train.batch_size, rows.eos_id, limit,
            mask_targets_before=rows.mask_targets_before,
        )  # fmt: skip
        return evaluate(model, batches, arithmetic, token_bytes).fields()

    def texts() -> Iterator[tuple[str, str]]:
        """One continuation of the prompt, the same random stream each time."""
        if length := config.eval.sample_tokens:
            sampling, prompt = SamplingConfig(max_new_tokens=length), config.eval.prompt
            [generation] = Engine(model, corpus.tokenizer).generate(prompt, sampling)
            yield prompt, generation.text

    questions, remarks = in_loop_eval.prepare(config.eval, model, corpus.tokenizer)
    made = loop.Task(model, next_token_loss, rows, assess, corpus.val_tokens, texts, questions)
    return made, remarks
