"""What every tuning of a trained model shares: where it starts from, and what of it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from gptsmith.model import lora
from gptsmith.model import state_dict as model_weights
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import LoraConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_scored
from gptsmith.model.tuning import Tuning
from gptsmith.recipes import loop
from gptsmith.recipes.options import Recipe
from gptsmith.run import Run, Which
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.options import OptimConfig

KINDS = {
    "text": "raw text: more pretraining, on another corpus",
    "chat": "conversations: answers to what a user says",
    "instruct": "instruction, input and output (Alpaca)",
    "classify": "text and label",
}


def main(argv: Sequence[str]) -> int:
    """`gptsmith finetune KIND [RECIPE.yaml] --from RUN --data FILE --out RUN2`."""
    kind = argv[0] if argv else "--help"
    if kind in ("-h", "--help"):
        print("usage: gptsmith finetune KIND [RECIPE.yaml] --from RUN --data FILE --out RUN2 ...")
        print("       (gptsmith finetune KIND --help tells the rest)\n")
        for name, text in KINDS.items():
            print(f"  {name:<10} {text}")
        return 0
    if kind not in KINDS:
        raise ValueError(f"finetune {kind!r}: there are {', '.join(KINDS)}")
    code: int = import_module(f"gptsmith.recipes.{kind}").main(argv[1:])
    return code


class FinetuneConfig(Recipe):
    """Options of every tuning."""

    model_config = ConfigDict(populate_by_name=True)
    default_epochs: ClassVar[float] = 3

    base: Path = Field(alias="from")
    """Run to start from."""
    checkpoint: Which = "last"
    """Its weights: last, best, or a step."""
    trust_code: bool = False
    """Allow a mask that is Python code in the run that is tuned."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Probability with which an activation is dropped (default: as in the run that is tuned)."""
    freeze: tuple[str, ...] = ()
    """Parameters to leave as they are, by pattern (`blocks.[0-3].*`), repeatable."""
    lora: LoraConfig = LoraConfig()
    """Adapters (LoRA). They want about ten times the learning rate of weights: 0.01."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, schedule="linear")


C = TypeVar("C", bound=FinetuneConfig)


@dataclass(frozen=True)
class Start:
    """What a tuning begins with."""

    model: GPTModel  # on the CPU in fp32, wrapped and frozen as the configuration says
    tokenizer: Tokenizer
    tuning: Tuning
    base: Mapping[str, Tensor]  # all weights before the first step, by their plain names

    @property
    def pad_id(self) -> int:
        """What fills rows; nothing that is scored sees it, so any id serves."""
        return self.tokenizer.special_tokens.get("<|pad|>", 0)


def origin(config: FinetuneConfig) -> Run:
    """The run that gives model, tokenizer and template: the base, or on resume the run itself,
    which needs its base no more."""
    return Run.open(config.out if config.resume else config.base)


def start(
    config: FinetuneConfig, run: Run, tokens: Sequence[str] = (), labels: Sequence[str] = ()
) -> Start:
    """The model of `run`, ready to be tuned.

    tokens: special tokens to append, with vectors that are the mean of the others; they are trained
    whatever else is frozen. labels: classes, for a model that shall tell them apart by a new head.
    """
    if run.model_config.labels and not labels:
        raise ValueError(
            f"--from {run.path} is a classifier, its output head is gone: start from the run that "
            "it was made of"
        )
    torch.manual_seed(config.train.seed)
    if config.resume:
        ids = run.tuning.token_ids
        if run.tuning.is_full_finetune:  # the weights are those of the checkpoint
            kind = GPTClassifier if run.model_config.labels else GPTModel
            model: GPTModel = kind(run.model_config, mask_folder=run.path, trust_code=True)
        else:
            model = run.base_model(trust_code=True)
        tokenizer = run.tokenizer
    else:
        model = run.load_model(config.checkpoint, trust_code=config.trust_code).float()
        tokenizer, used = run.tokenizer.add_special_tokens(tokens), run.tokenizer.vocab_size
        ids = tuple(tokenizer.special_tokens[name] for name in tokens)
        if tokenizer.vocab_size > used:
            size = max(model.config.vocab_size, tokenizer.vocab_size)
            model = model_weights.resize_token_embeddings(model, size, used)
        if config.dropout is not None:
            model = model_weights.with_dropout(model, config.dropout)
        if labels:
            model = model_weights.with_classification_head(model, labels)
    tuning = Tuning(lora=config.lora, freeze=config.freeze)
    if not tuning.is_full_finetune:
        tuning = tuning.model_copy(update=dict(token_ids=ids))
    base = {} if tuning.is_full_finetune else {n: t.clone() for n, t in model.state_dict().items()}
    tuning.wrap(model)
    model.activation_checkpointing = config.train.activation_checkpointing
    return Start(model, tokenizer, tuning, base)


def resolve(config: C, begin: Start, samples: loop.Dataset) -> tuple[C, loop.Duration, list[str]]:
    """`loop.resolve` for a tuning; the model goes to its device."""
    config, plan, notes = loop.resolve(config, begin.model.config, samples)
    begin.model.to(config.train.device)
    notes.insert(1, f"from {config.base}: {lora.trainable(begin.model)}")
    return config, plan, notes


def create(
    config: FinetuneConfig,
    begin: Start,
    source: Run,
    *,
    corpus: str,
    template: str | None = None,
    fixed: Sequence[str] = (),
) -> Run:
    """The run folder of a tuning, locked. corpus, fixed: see Run.create. source: see `origin`."""
    architecture = begin.model.config
    file, _, function = architecture.mask.rpartition(":")
    if file == "mask.py":  # the new run gets its own copy
        architecture = architecture.change(mask=f"{source.path / file}:{function}")
    return Run.create(
        config.out, config.model_dump(mode="json", by_alias=True), architecture, begin.tokenizer,
        config.resume, corpus=corpus, fixed=("from", "checkpoint", "dropout", *fixed, *loop.FIXED),
        template=template, tuned=begin.tuning, base=begin.base,
    )  # fmt: skip


def longest(wanted: int | None, begin: Start) -> int:
    """Tokens of the longest text. ValueError if the model cannot read so many."""
    limit = begin.model.config.context_length
    if wanted is not None and wanted > limit:
        raise ValueError(f"--context-length {wanted} is more than the model's {limit}")
    return wanted or limit


def row_length(wanted: int | None, begin: Start) -> int:
    """`longest`, for next-token loss. ValueError also if the mask lets tokens see their own
    target."""
    config, mask = begin.model.config, begin.model.mask
    T = longest(wanted, begin)
    if start := first_scored(mask, T, config.n_head, config.n_layer):
        raise ValueError(
            f"the mask {mask.expression} shows the first {start} tokens their own targets: an "
            "answer there teaches nothing; tune a model with a mask inside causal()"
        )
    return T
