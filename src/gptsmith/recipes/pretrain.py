"""Train on a prepared corpus: pretraining from scratch, or continued from an existing model.

Continuing on a domain's raw text before fine-tuning improves results on its tasks (Howard & Ruder
2018, "ULMFiT"; Gururangan et al. 2020, "Don't stop pretraining").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from gptsmith.data.dataset import Windows, validation_batches
from gptsmith.data.shards import Corpus
from gptsmith.evaluate import perplexity
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.model import masks
from gptsmith.model.gpt import GPTModel
from gptsmith.model.init import deferred_init, init_parameter
from gptsmith.model.target_leakage import first_target
from gptsmith.recipes import finetune, in_loop_eval, loop, plan
from gptsmith.recipes.job import TrainingJob
from gptsmith.recipes.options import CorpusConfig, PretrainConfig, TextConfig
from gptsmith.recipes.plan import Note, Plan
from gptsmith.run.create import open_for_training
from gptsmith.train import distributed
from gptsmith.train.loss import next_token_loss


def pretrain(config: PretrainConfig, started: float | None = None) -> int:
    """Train from scratch; returns the exit code, 0 or loop.STOPPED.

    started: time.perf_counter() at which `seconds` begins. Raises ValueError for a corpus or a
    configuration that cannot be trained, before anything is written.
    """
    corpus = _open_corpus(config)
    vocab = -(-corpus.tokenizer.vocab_size // config.pad_vocab_multiple) * config.pad_vocab_multiple
    config = config.model_copy(update=dict(model=config.model.change(vocab_size=vocab)))
    T = config.model.context_length
    mask_folder = config.out if config.resume else Path()  # a run has a copy of the mask's file
    mask = masks.parse(config.model.mask, folder=mask_folder, trust_code=True)
    start = first_target(mask, T, config.model.n_head, config.model.n_layer)
    windows = _windows(config, corpus, T, start)
    resolved = plan.resolve(config, config.model, windows)
    config = resolved.config
    torch.manual_seed(config.train.seed)
    with deferred_init() if resolved.is_sharded else nullcontext():
        model = GPTModel(config.model, mask_folder=mask_folder, trust_code=True)
    generator = torch.Generator().set_state(torch.get_rng_state())
    if not resolved.is_sharded:
        model.to(resolved.runtime.device)
    model.activation_checkpointing = config.train.activation_checkpointing
    job, notes = _job(resolved, corpus, windows, model)
    job = replace(
        job, init_parameter=partial(init_parameter, config=config.model, generator=generator)
    )
    settings = config.model_dump(mode="json", by_alias=True)
    run = open_for_training(
        config.out, settings, config.model, corpus.tokenizer, config.resume,
        corpus=corpus.fingerprint, fixed=("document_mask", "pad_vocab_multiple", *loop.FIXED),
        last_step=resolved.duration.steps,
    )  # fmt: skip
    return loop.train(run, job, resolved.with_notes(notes), started)


def continue_pretraining(config: TextConfig, started: float | None = None) -> int:
    """`gptsmith finetune text`: continue on another corpus; the exit code as of `pretrain`."""
    corpus = _open_corpus(config)
    base = finetune.base_run(config)
    if corpus.tokenizer.fingerprint != base.tokenizer.fingerprint:
        raise ValueError(
            f"{config.data} was not made with the tokenizer of {base.path}: prepare it again "
            f"with --tokenizer {base.path}"
        )
    prepared = finetune.prepare(config, base)
    model, shape = prepared.model, prepared.model.config
    T = finetune.max_length(config.context_length, prepared.model.config)
    windows = _windows(config, corpus, T, first_target(model.mask, T, shape.n_head, shape.n_layer))
    resolved = finetune.resolve(config, prepared, windows)
    job, notes = _job(resolved, corpus, windows, model)
    if corpus.document != base.tokenizer.special_ids.document:
        why = f"documents of {config.data} do not begin and end as texts of {base.path} do"
        notes.append(Note("data", f"{why}: an earlier version made it; prepare it again"))
    run = finetune.create_run(
        resolved, prepared, corpus=corpus.fingerprint, template=base.template,
        fixed=("document_mask", "context_length"),
    )  # fmt: skip
    return loop.train(run, job, resolved.with_notes(notes), started)


def _open_corpus(config: CorpusConfig) -> Corpus:
    try:
        return Corpus.open(config.data)
    except FileNotFoundError as error:
        if not config.resume:
            raise
        raise FileNotFoundError(f"{error}; or, if it was moved, give --data") from None


def _windows(config: CorpusConfig, corpus: Corpus, T: int, mask_targets_before: int) -> Windows:
    """Training rows of the corpus. mask_targets_before: see model/target_leakage.py."""
    documents = corpus.document if config.document_mask else None
    return Windows(
        corpus.train, T, config.train.seed, documents, mask_targets_before,
        context_only=corpus.document.context_only,
    )  # fmt: skip


def _job(
    resolved: Plan[CorpusConfig], corpus: Corpus, windows: Windows, model: GPTModel
) -> tuple[TrainingJob, list[Note]]:
    """The training job, and notes on its data. model: on its device."""
    config = resolved.config
    corpus.tokenizer.encode(config.eval.prompt)  # raises now if it cannot be encoded
    val_bytes = int(corpus.manifest["splits"]["val"]["bytes"])
    token_bytes = perplexity.target_bytes(
        corpus.tokenizer, corpus.val, val_bytes, windows.context_only
    )

    def evaluate(limit: int | None) -> Mapping[str, float | int | None]:
        batches = validation_batches(
            corpus.val, windows.T, 2 * config.train.batch_size, windows.documents, limit,
            mask_targets_before=windows.mask_targets_before, context_only=windows.context_only,
        )  # fmt: skip
        return perplexity.evaluate(model, batches, resolved.runtime.precision, token_bytes).fields()

    def samples() -> Iterator[tuple[str, str]]:
        """One continuation of the prompt, with the same random numbers each time."""
        if length := config.eval.sample_tokens:
            sampling, prompt = SamplingConfig(max_new_tokens=length), config.eval.prompt
            [generation] = Engine(model, corpus.tokenizer).generate(prompt, sampling)
            yield prompt, generation.text

    evaluate_tasks, task_notes = in_loop_eval.prepare(config.eval, model, corpus.tokenizer)
    sizes = f"{corpus.train_tokens:,} training tokens, {corpus.val_tokens:,} for validation"
    if distributed.rank() == 0:
        corpus.train.verify_in_background()
    job = TrainingJob(
        model, next_token_loss, windows, evaluate, corpus.val_tokens, samples, evaluate_tasks,
        verify_data=corpus.train.verify,
    )  # fmt: skip
    return job, [Note("data", sizes), *task_notes]
