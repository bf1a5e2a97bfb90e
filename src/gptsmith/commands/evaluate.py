"""`gptsmith evaluate RUN`: loss, perplexity, bits per byte and accuracy on a corpus."""

from pathlib import Path

import torch
from pydantic import Field

from gptsmith import settings
from gptsmith.commands.weights import WeightOptions
from gptsmith.data.batches import validation_batches
from gptsmith.data.shards import Corpus
from gptsmith.evaluate import perplexity
from gptsmith.model.leakage import first_scored
from gptsmith.run import Run
from gptsmith.train.loss import score_from
from gptsmith.train.precision import Name, choose


class EvaluateOptions(WeightOptions):
    """What to score."""

    data: Path | None = None
    """Corpus whose validation split is scored (default: the one that the run was trained on)."""
    batch_size: int = Field(32, ge=1)
    """Windows that go through the model at once."""
    precision: Name = "fp32"
    """Number format of matrix products."""


def main(argv: list[str]) -> None:
    options = settings.load(
        EvaluateOptions,
        argv,
        prog="gptsmith evaluate",
        description="Measure a trained model on the validation split of a corpus.",
        positional="run",
    )
    arithmetic = choose(options.precision, options.where())
    run = Run.open(options.run)
    data = options.data or run.config.get("data")
    if data is None:
        raise ValueError(f"{run.path}/config.yaml names no corpus: give --data")
    corpus = Corpus.open(data)
    if corpus.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise ValueError(
            f"{corpus.path} was made with another tokenizer than {run.path}: prepare that text "
            f"with --tokenizer {run.path / 'tokenizer.json'}"
        )
    model = options.load(run)
    c = run.model_config
    start = first_scored(model.mask, c.context_length, c.n_head, c.n_layer)
    eos = corpus.tokenizer.eos_id if run.config.get("document_mask") else None
    batches = validation_batches(corpus.val, c.context_length, options.batch_size, eos)
    scored = (score_from(batch, start) for batch in batches)
    token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes())
    scores = perplexity.evaluate(model, scored, arithmetic, token_bytes)
    print(f"{run.path} on the validation split of {corpus.path}, {scores.tokens:,} tokens")
    print(f"  loss          {scores.loss:.4f} nats per token")
    print(f"  perplexity    {scores.perplexity:,.2f}")
    if scores.bits_per_byte is not None:
        print(f"  bits per byte {scores.bits_per_byte:.4f}")
    print(f"  next token    {scores.top1:.1%} guessed first, {scores.top5:.1%} in five guesses")
