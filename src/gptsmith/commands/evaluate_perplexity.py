"""The task perplexity of `gptsmith evaluate`: on a corpus, or on any text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from gptsmith.commands.evaluate_options import EvaluateOptions
from gptsmith.config import flatten
from gptsmith.data.dataset import validation_batches, validation_windows
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import Corpus
from gptsmith.data.sources import encode_source
from gptsmith.evaluate import perplexity
from gptsmith.evaluate.progress import progress
from gptsmith.evaluate.report import Result
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_scored
from gptsmith.run import Run, is_run
from gptsmith.train.runtime import Precision, choose_precision


def prepare(
    options: EvaluateOptions, run: Run, model: Callable[[], GPTModel]
) -> Callable[[], Result]:
    """The measurement, ready to be made: the text is read now, the model when it begins."""
    arithmetic, why = _arithmetic(options, run)
    c = run.model_config
    T = options.window or min(c.context_length, 2048)
    if T > c.context_length:
        raise ValueError(f"--window {T} is more than the model's context of {c.context_length}")
    stride = options.stride or T
    if stride > T:
        raise ValueError(f"--stride {stride} is more than the window of {T}: it would skip tokens")
    shards, what = _text(options, run)
    eos = run.tokenizer.eos_id if run.config.get("document_mask") else None
    B, limit = options.batch_size or max(1, 8192 // T), options.limit and options.limit * stride

    def job() -> Result:
        start = first_scored(model().mask, T, c.n_head, c.n_layer)
        batches = validation_batches(shards, T, B, eos, limit, stride, mask_targets_before=start)
        count = -(-len(validation_windows(shards, T, limit, stride)) // B)
        shown = progress(batches, "perplexity", count)
        token_bytes = torch.from_numpy(run.tokenizer.token_bytes())
        scores = perplexity.evaluate(model(), shown, arithmetic, token_bytes)
        how = "" if stride == T else f", every {stride:,}"
        print(f"{run.path} on {what}, {scores.tokens:,} tokens, windows of {T:,}{how}")
        weights = model().head_weight.dtype
        name, because = arithmetic.name, why
        if weights != torch.float32 and name == "fp32":  # nothing is converted, up or down
            name, because = str(weights).removeprefix("torch."), "that of the weights"
        print(f"  precision     {name}, {because}")
        print(f"  loss          {scores.loss:.4f} nats per token")
        print(f"  perplexity    {scores.perplexity:,.2f}")
        if scores.bits_per_byte is not None:
            print(f"  bits per byte {scores.bits_per_byte:.4f}")
        print(f"  next token    {scores.top1:.1%} guessed first, {scores.top5:.1%} in five guesses")
        values = {name: value for name, value in scores.fields().items() if value is not None}
        details = {"on": what, "window": T, "stride": stride, "precision": name}
        return Result("perplexity", int(values.pop("tokens")), values, {}, details=details)

    return job


def _text(options: EvaluateOptions, run: Run) -> tuple[Sequence[np.ndarray], str]:
    """Streams of tokens to be predicted, and what they are."""
    data = options.data
    if data is not None and not Corpus.is_at(data):
        if is_run(Path(data)):
            raise ValueError(f"--data {data} is a run: give a corpus or text")
        report = ReadReport("skip")
        stream = encode_source(
            data, run.tokenizer, ReadOptions(text_column=options.text_column), report
        )
        for line in report.skipped.lines():
            print(f"{data}: {line}", file=sys.stderr)
        return [stream], data
    data = data or run.config.get("data")
    # document_mask is what recipes have that take a prepared corpus (recipes/corpus.py).
    if not isinstance(data, str) or (options.data is None and "document_mask" not in run.config):
        raise ValueError(
            f"{run.path} was not trained on a prepared corpus: give --data, or other --tasks"
        )
    try:
        corpus = Corpus.open(data)
    except FileNotFoundError as error:
        if options.data is not None:
            raise
        raise FileNotFoundError(f"{run.path} was trained on {error}; or give --data") from None
    if corpus.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise ValueError(
            f"{corpus.path} was made with another tokenizer than {run.path}: give the text itself "
            f"as --data, or prepare it with --tokenizer {run.path / 'tokenizer.json'}"
        )
    return corpus.val, f"the validation split of {corpus.path}"


def _arithmetic(options: EvaluateOptions, run: Run) -> tuple[Precision, str]:
    """The precision to measure in, and why that one."""
    device = options.where()
    if options.precision != "auto":
        return choose_precision(options.precision, device), "as asked for"
    trained = flatten(run.config).get("train.precision")
    if trained is None:
        return choose_precision("fp32", device), "that of the weights"
    if trained == "fp16" and device.type == "cpu":
        return choose_precision("fp32", device), "because the fp16 of its training is for GPUs"
    return choose_precision(trained, device), "as in training"
