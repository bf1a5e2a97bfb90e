"""Shared by all kinds of fine-tuning: preparing the base model, and training on examples (SFT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.examples import Examples
from gptsmith.data.packing import PackedRows, PaddedRows
from gptsmith.evaluate import perplexity
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.model import flops, lora
from gptsmith.model import state_dict as model_weights
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_target
from gptsmith.model.tuning import Tuning
from gptsmith.recipes import in_loop_eval, loop, plan
from gptsmith.recipes.job import TrainingJob
from gptsmith.recipes.options import (
    ChatConfig,
    EvalConfig,
    FinetuneConfig,
    PreferenceConfig,
    SFTConfig,
)
from gptsmith.recipes.plan import Dataset, Note, Plan
from gptsmith.recipes.reward_options import RewardConfig
from gptsmith.run import Run
from gptsmith.run.create import open_for_training
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.loss import next_token_loss

BUILT_IN = "skills"  # the data set that needs no file

C = TypeVar("C", bound=FinetuneConfig)


@dataclass(frozen=True)
class PreparedModel:
    """A model ready for fine-tuning.

    model         fp32, with adapters attached and parameters frozen as configured; on the CPU until
                  `resolve`
    base_weights  all weights before the first step, by their plain names, in the memory of the
                  model; empty if all are trained, and once `create_run` has written them
    run           the run that model and tokenizer come from (see `base_run`)
    """

    model: GPTModel
    tokenizer: Tokenizer
    tuning: Tuning
    base_weights: dict[str, Tensor]
    run: Run

    @property
    def pad_id(self) -> int:
        """The id that pads rows. It is never a target nor attended to, so any id would do."""
        return self.tokenizer.special_tokens.get("<|pad|>", 0)


def base_run(config: FinetuneConfig) -> Run:
    """The run that provides model, tokenizer and template: the base run or, on resume, the run
    itself, which no longer needs its base."""
    return Run.open(config.out if config.resume else config.base)


def uses_built_in(config: ChatConfig | PreferenceConfig | RewardConfig) -> bool:
    """Whether --data is the built-in set. ValueError if it is mixed with files, or is --val, and
    for a number of questions that nothing reads."""
    data, questions = config.data, config.questions
    if BUILT_IN in config.val:
        raise ValueError(
            f"--val {BUILT_IN}: the built-in set is for --data: omit --val, or give a file"
        )
    if BUILT_IN in data and len(data) > 1:
        raise ValueError(f"--data {BUILT_IN} is the built-in set: do not mix it with files")
    default = type(config).model_fields["questions"].default
    if BUILT_IN not in data and questions != default and not config.resume:
        raise ValueError(
            f"questions {questions:,} is for --data {BUILT_IN}, and files are read whole: omit it"
        )
    return BUILT_IN in data


def prepare(
    config: FinetuneConfig, run: Run, tokens: Sequence[str] = (), labels: Sequence[str] = ()
) -> PreparedModel:
    """The model of `run`, ready for fine-tuning.

    tokens: special tokens to add; their embeddings start as the mean of the others and are trained
    even if all others are frozen. labels: classes, for a model with a new classification head.
    """
    if run.model_config.labels and not labels:
        raise ValueError(
            f"--from {run.path} is a classifier without an output head: start from the run that "
            "it was fine-tuned from"
        )
    torch.manual_seed(config.train.seed)
    if config.resume:
        ids = run.tuning.token_ids
        if run.tuning.is_full_finetune:  # the weights are in the checkpoint
            kind = GPTClassifier if run.model_config.labels else GPTModel
            model: GPTModel = kind(run.model_config, mask_folder=run.path, trust_code=True)
        else:
            model = run.base_model(trust_code=True, quantized=True)
            # As when the run began: in memory of their own. MKL's sums may depend on its alignment,
            # which a mapped file does not have.
            for p in model.parameters():
                p.data = p.data.clone()
        tokenizer = run.tokenizer
    else:
        model = run.load_for_training(config.checkpoint, config.quantize, config.trust_code)
        tokenizer, used = run.tokenizer.add_special_tokens(tokens), run.tokenizer.vocab_size
        ids = tuple(tokenizer.special_tokens[name] for name in tokens)
        if tokenizer.vocab_size > used:
            size = max(model.config.vocab_size, tokenizer.vocab_size)
            model = model_weights.resize_token_embeddings(model, size, used)
        if config.dropout is not None:
            model = model_weights.with_dropout(model, config.dropout)
        if labels:
            model = model_weights.with_classification_head(model, labels)
    tuning = Tuning(lora=config.lora, freeze=config.freeze, quantize=config.quantize)
    if not tuning.is_full_finetune:
        tuning = tuning.model_copy(update=dict(token_ids=ids))
    base = {} if tuning.is_full_finetune else dict(model.state_dict())
    tuning.wrap(model)
    model.activation_checkpointing = config.train.activation_checkpointing
    return PreparedModel(model, tokenizer, tuning, base, run)


def shares_prefixes(model: GPTModel) -> bool:
    """Whether positions with equal tokens up to them have equal vectors in training: the mask
    permits it, and no dropout, of the model or of adapters, makes them differ."""
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return model.mask.shares_prefixes and not has_dropout


def resolve(config: C, prepared: PreparedModel, dataset: Dataset) -> Plan[C]:
    """`plan.resolve` for fine-tuning; moves the model to its device, unless it is to be sharded."""
    model = prepared.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    resolved = plan.resolve(config, model.config, dataset, trained, config.quantize)
    if not resolved.is_sharded:
        model.to(resolved.runtime.device)
    text = f"{config.base}, {lora.trainable_summary(model)}"
    if config.quantize:
        size = flops.weight_bytes(model.config, config.quantize) / 2**20
        text += f"; blocks in {config.quantize}, so that all weights take {size:,.0f} MiB"
    return resolved.with_notes([Note("base", text)])


def create_run(
    plan: Plan[C],
    prepared: PreparedModel,
    *,
    corpus: str,
    template: str | None = None,
    fixed: Sequence[str] = (),
) -> Run:
    """The run folder, locked. corpus, fixed: see open_for_training."""
    config = plan.config
    architecture = prepared.model.config
    file, _, function = architecture.mask.rpartition(":")
    if file == "mask.py":  # the new run gets its own copy
        architecture = architecture.change(mask=f"{prepared.run.path / file}:{function}")
    run = open_for_training(
        config.out, config.model_dump(mode="json", by_alias=True), architecture,
        prepared.tokenizer, config.resume, corpus=corpus,
        fixed=("from", "checkpoint", "dropout", *fixed, *loop.FIXED),
        last_step=plan.duration.steps,
        template=template, tuning=prepared.tuning, base=prepared.base_weights,
    )  # fmt: skip
    prepared.base_weights.clear()  # a model on another device no longer needs that memory
    return run


def max_length(context_length: int | None, model: ModelConfig) -> int:
    """Maximum length of a text in tokens: as configured, else the model's context length."""
    limit = model.context_length
    if context_length is not None and context_length > limit:
        raise ValueError(f"--context-length {context_length} is more than the model's {limit}")
    return context_length or limit


def row_length(context_length: int | None, prepared: PreparedModel) -> int:
    """`max_length` of rows for SFT; ValueError if the mask lets tokens attend to their target."""
    config, mask = prepared.model.config, prepared.model.mask
    T = max_length(context_length, config)
    if start := first_target(mask, T, config.n_head, config.n_layer):
        raise ValueError(
            f"the mask {mask.expression} shows the first {start} tokens their own targets: answers "
            "there cannot be trained on; fine-tune a model with a causal mask"
        )
    return T


def with_samples_per_step(config: C, names: Sequence[str], T: int, per_epoch: int) -> C:
    """The configuration with the size of a step in tokens, as the training loop needs it.

    names: of the fields whose product is the size as a number of samples; the first one counts
    items of the data, of which there are per_epoch. T: tokens of the longest sample.

    Batches have many shapes, for which compiling does not pay off: `auto` means off here.
    """
    train, values = config.train, [getattr(config, name) for name in names]
    samples = math.prod(values)
    default = type(config).model_fields[names[0]].default
    # The default is taken as it is: a few items are for a trial.
    if values[0] > per_epoch and values[0] != default and not config.resume:
        items, flag = names[0].split("_")[0], names[0].replace("_", "-")
        B = train.batch_size
        whole = B // math.gcd(B, math.prod(values[1:]))  # items that fill micro-batches
        most = per_epoch - per_epoch % whole
        smaller = "" if most else f" --train.batch-size {per_epoch}"
        raise ValueError(
            f"{names[0]} {values[0]:,} is more than the {per_epoch:,} {items} to train on: "
            f"give --{flag} {most or per_epoch}{smaller}"
        )
    if samples % train.batch_size:
        product = " x ".join(f"{n} {v}" for n, v in zip(names, values, strict=True))
        result = f" = {samples}" if len(names) > 1 else ""
        largest_first = range(train.batch_size, 0, -1)
        raise ValueError(
            f"{product}{result} is not a multiple of train.batch_size {train.batch_size}: "
            f"give --train.batch-size {next(b for b in largest_first if samples % b == 0)}"
        )
    if train.total_batch_tokens not in (None, samples * T) and not config.resume:
        flags = " and ".join("--" + name.replace("_", "-") for name in names)
        raise ValueError(f"train.total_batch_tokens: use {flags} for {config.stage}")
    compiled = "off" if train.compile == "auto" else train.compile
    train = train.model_copy(update=dict(total_batch_tokens=samples * T, compile=compiled))
    return config.model_copy(update=dict(train=train))


def chat_samples(
    config: EvalConfig,
    model: GPTModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
) -> Callable[[], Iterator[tuple[str, str]]]:
    """The model's greedy answers to the prompts (ids), for TrainingJob."""

    def samples() -> Iterator[tuple[str, str]]:
        if length := config.sample_tokens:
            greedy = SamplingConfig(max_new_tokens=length, temperature=0)
            replies = Chat(model, tokenizer, template).reply_all(prompts, greedy)
            for ids, reply in zip(prompts, replies, strict=True):
                yield tokenizer.decode(ids), reply.text

    return samples


# --- supervised fine-tuning on examples ----------------------------------------------------------


@dataclass(frozen=True)
class SFTData:
    """Examples for training and validation, and prompts (ids) to answer at each evaluation."""

    train: Examples
    val: Examples
    prompts: Sequence[Sequence[int]]
    notes: Sequence[Note]


def train_on_examples(
    config: SFTConfig,
    prepared: PreparedModel,
    template: ChatTemplate,
    T: int,
    data: SFTData,
    *,
    fixed: Sequence[str],
    started: float | None,
) -> int:
    """Supervised fine-tuning; returns the exit code, 0 or loop.STOPPED.

    T: tokens per row (see `row_length`). fixed: see open_for_training. started: see loop.train.
    """
    model, tokenizer = prepared.model, prepared.tokenizer
    seed, pad_id = config.train.seed, prepared.pad_id
    rows, val_rows = (
        PackedRows(part, T, seed, pad_id) if config.pack else PaddedRows(part, T, seed, pad_id)
        for part in (data.train, data.val)
    )
    if not config.pack and config.train.compile == "auto":  # rows would all be padded to T
        train = config.train.model_copy(update=dict(compile="off"))
        config = config.model_copy(update=dict(train=train))
    resolved = resolve(config, prepared, rows)
    config, runtime = resolved.config, resolved.runtime
    if isinstance(rows, PaddedRows):
        rows.fixed = runtime.compile  # a single shape, a single graph
    sizes = tokenizer.token_bytes()
    token_bytes = None if sizes is None else torch.from_numpy(sizes)

    def evaluate(limit: int | None) -> Mapping[str, float | int | None]:
        batches = val_rows.validation(2 * config.train.batch_size, limit)
        return perplexity.evaluate(model, batches, runtime.precision, token_bytes).fields()

    samples = chat_samples(config.eval, model, tokenizer, template, data.prompts)
    evaluate_tasks, task_notes = in_loop_eval.prepare(config.eval, model, tokenizer)
    run = create_run(
        resolved, prepared, template=template.source,
        corpus=data.train.fingerprint[:32] + data.val.fingerprint[:32],
        fixed=("pack", "context_length", *fixed),
    )  # fmt: skip
    job = TrainingJob(
        model, next_token_loss, rows, evaluate, data.val.tokens, samples, evaluate_tasks
    )
    return loop.train(run, job, resolved.with_notes([*data.notes, *task_notes]), started)
