"""Configuration of all recipes; torch is not needed to read it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from gptsmith.config import Section
from gptsmith.data.options import (
    ChatFiles,
    FileFormat,
    InstructionColumns,
    LabelledConfig,
    Paths,
    PreferenceFiles,
    SplitConfig,
)
from gptsmith.model.config import LoraConfig, ModelConfig, Quantization
from gptsmith.run.layout import CheckpointName
from gptsmith.train.options import (
    CompileMode,
    OptimConfig,
    PreferenceKind,
    TrainingPrecision,
)

# --- sections ------------------------------------------------------------------------------------


class TrainConfig(Section):
    """Length of the run, batch, and how the machine computes."""

    steps: int | None = Field(None, ge=1)
    """Length in optimizer steps. Give one of steps, tokens, epochs and seconds (default: 1 epoch;
    3 for finetune chat and instruct, 4 for classify)."""
    tokens: int | None = Field(None, ge=1)
    """Length in training tokens, padding included."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Length in passes over the data."""
    seconds: float | None = Field(None, gt=0)
    """Length in wall-clock seconds from the start of the command; a resumed run then ends at
    another step than an uninterrupted one."""
    batch_size: int = Field(32, ge=1)
    """Sequences per forward pass (micro-batch)."""
    total_batch_tokens: int | None = Field(None, ge=1)
    """Tokens per optimizer step, accumulated over micro-batches (default: one micro-batch)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initial weights, sample order and dropout."""
    precision: TrainingPrecision = "auto"
    """Number format of matrix products; auto chooses the fastest safe one and says why. fp8: bf16,
    and 8-bit floating point in the linear layers of the blocks, on GPUs from Ada and Hopper on;
    never chosen by auto."""
    compile: CompileMode = "auto"
    """torch.compile; auto compiles if it saves time and says why."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    deterministic: bool = False
    """On a GPU, too, equal runs give equal bits, also after a resume: PyTorch's deterministic
    algorithms, which are slower. A CPU needs no such option."""
    num_threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads (default: PyTorch's choice, which is recorded)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    shard: bool = False
    """Several ranks: divide weights, gradients and optimizer state among them (FSDP2), for a model
    that does not fit each GPU; to evaluate, each gathers all weights."""
    spike_sigmas: float = Field(8.0, ge=0)
    """Skip a step whose loss exceeds the mean of the last 64 by this many standard deviations; 0:
    never."""
    max_skips: int = Field(10, ge=1)
    """Stop after this many skipped steps in a row."""

    @model_validator(mode="after")
    def _check_length(self) -> TrainConfig:
        given = [n for n in ("steps", "tokens", "epochs", "seconds") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are both given: give one length of the run; "
                f"--train.{given[0]} none unsets the first"
            )
        return self


class EvalConfig(Section):
    """Evaluation during training."""

    interval: int = Field(100, ge=0)
    """Steps between evaluations; 0: at the end only."""
    tokens: int | None = Field(200_000, ge=1)
    """Validation tokens per evaluation, ten times as many at the end; none: always all.
    `gptsmith evaluate` uses all."""
    patience: int = Field(0, ge=0)
    """Stop early after this many evaluations without improvement; 0: never."""
    prompt: str = ""
    """Prompt of the samples."""
    sample_tokens: int = Field(120, ge=0)
    """Length of the sample at each evaluation; 0: none."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks to evaluate as well (hellaswag_gpt2, piqa ...), repeatable; drawn below
    the loss."""
    task_data: Path | None = None
    """Files of the tasks (default: $GPTSMITH_DATA, else the Hub)."""
    task_items: int = Field(200, ge=1)
    """Use the first N questions of each task; with 200, the standard error is 3%."""


class SaveConfig(Section):
    """Checkpoints: always at step 0, at a new best, on SIGTERM or SIGINT, and at the end."""

    model_config = ConfigDict(populate_by_name=True)

    interval: int = Field(0, ge=0)
    """Steps between additional checkpoints; 0: by time only."""
    seconds: float = Field(60.0, gt=0)
    """Seconds between checkpoints, and at least 30 times as long as the last one took to write:
    with the time of a write, the most work that a crash can lose."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep, besides the best."""
    background: bool = Field(True, alias="async")
    """Write while training goes on, which takes a second copy of weights and optimizer in the
    CPU's memory, beside a GPU up to twice their size; where that is too small, training waits."""


class MonitorConfig(Section):
    """Metrics besides metrics.jsonl, metrics.csv and curves.png."""

    trackers: tuple[str, ...] = ("auto",)
    """auto (TensorBoard if it is installed), none, tensorboard, wandb, mlflow, trackio."""
    log_interval: int = Field(10, ge=1)
    """Steps between metrics."""


# --- recipes -------------------------------------------------------------------------------------


class RecipeConfig(Section):
    """Options of every recipe."""

    default_epochs: ClassVar[float] = 1  # if no length is configured

    stage: str
    out: Path
    """Run folder to write."""
    resume: bool = False
    """Resume from the newest good checkpoint of the run folder."""
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    monitor: MonitorConfig = MonitorConfig()


class CorpusConfig(RecipeConfig):
    """Options of training on a prepared corpus."""

    data: Path
    """Corpus made by `gptsmith prepare`."""
    document_mask: bool = False
    """Restrict attention to the token's own document."""


class PretrainConfig(CorpusConfig):
    """Train a model from scratch on a prepared corpus."""

    stage: Literal["pretrain"] = "pretrain"
    pad_vocab_multiple: int = Field(1, ge=1)
    """Round the model's vocabulary up to a multiple of this (64 is faster on GPUs)."""
    model: ModelConfig = ModelConfig.preset("fast")
    """Architecture of the model, by default the preset fast (ModelConfig() in Python differs:
    context_length 1024, norm_eps 1e-5, no qk_norm)."""


class FinetuneConfig(RecipeConfig):
    """Options of every kind of fine-tuning."""

    model_config = ConfigDict(populate_by_name=True)
    default_epochs: ClassVar[float] = 3

    base: Path = Field(alias="from")
    """Run to start from."""
    checkpoint: CheckpointName = "last"
    """Which of its weights to start from: last, best, or a step."""
    trust_code: bool = False
    """Allow a mask that is Python code in the base run."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout probability of activations (default: as in the base run)."""
    freeze: tuple[str, ...] = ()
    """Parameters to freeze, by pattern (`blocks.[0-3].*`), repeatable."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters (LoRA); they need about ten times the learning rate at which all weights
    are trained."""
    quantize: Quantization | None = None
    """With --lora.rank: the linear layers of the blocks, which are frozen, in 4 bits (nf4) or 8
    (int8), a seventh or a quarter of their memory (QLoRA). --train.activation-checkpointing and a
    small --train.batch-size save most of what is left (default: fp32)."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, schedule="linear")

    @model_validator(mode="after")
    def _check_precision(self) -> FinetuneConfig:
        given = f"quantize {self.quantize}"
        if self.quantize and not self.lora.rank:
            raise ValueError(
                f"{given} is for adapters, quantized weights are not trained: give lora.rank"
            )
        if self.quantize and self.train.shard:
            raise ValueError(
                f"{given} and train.shard: quantized weights are not divided; omit one"
            )
        if self.quantize and self.train.precision == "fp8":
            raise ValueError(f"{given} and train.precision fp8: use bf16 or auto")
        if self.stage in ("preference", "reward") and self.train.precision == "fp8":
            # which a model has in training only: the two would differ before the first step
            raise ValueError(
                f"train.precision fp8: finetune {self.stage} compares the model with one that is "
                "evaluated in bf16; use bf16 or auto"
            )
        return self


class TextConfig(FinetuneConfig, CorpusConfig):
    """Continue the pretraining of a model on another corpus."""

    default_epochs: ClassVar[float] = 1

    stage: Literal["text"] = "text"
    data: Path
    """Corpus made by `gptsmith prepare --tokenizer RUN`."""
    context_length: int | None = Field(None, ge=2)
    """Tokens per row (default: the model's context)."""


class SFTConfig(FinetuneConfig):
    """Options of fine-tuning on examples: prompts with the answers to train on."""

    context_length: int | None = Field(None, ge=2)
    """Tokens per row (default: the model's context)."""
    pack: bool = True
    """Pack several examples into a row, each attending to itself only; otherwise a row has one
    example and padding."""


class ChatConfig(SFTConfig, ChatFiles):
    """Fine-tune a model on conversations."""

    stage: Literal["chat"] = "chat"
    data: tuple[str, ...] = Field(min_length=1)
    """Conversations: files, folders or patterns (.jsonl, .parquet, .arrow ...), the output of
    `gptsmith prepare --format chat`, or `skills`, the built-in set. Repeatable."""
    val: tuple[str, ...] = ()
    """Conversations for validation, repeatable (default: a share of the data)."""
    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the conversations for validation, without --val."""
    template: Path | None = None
    """Chat template, a Jinja file (default: the model's own, else that of gptsmith)."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that --template contains (`<|im_start|>`), repeatable (default: those of
    gptsmith for a model without a template, else none)."""
    questions: int = Field(20_000, ge=1, le=1_000_000)
    """Number of conversations to generate for the built-in set."""


class InstructConfig(SFTConfig, SplitConfig, FileFormat):
    """Fine-tune a model on instructions and their answers."""

    stage: Literal["instruct"] = "instruct"
    data: Paths
    """Rows with instruction, output and optionally input: .json, .jsonl, .csv, .parquet ...; files,
    folders or patterns, repeatable."""
    columns: InstructionColumns = InstructionColumns()
    prompt: str | None = None
    r"""Prompt format: a text with {instruction} and {input}, such as (in a shell)
    $'Q: {instruction}\n{input}\nA:\n' (default: the model's chat template if it has one, else the
    classic Alpaca prompt)."""
    mask_prompt: bool = True
    """Compute the training loss on the answers only, not on the prompts. The validation loss is
    always that of the answers."""
    responses: int = Field(100, ge=0)
    """Number of test instructions to answer after training, for judging (responses.json)."""
    response_tokens: int = Field(256, ge=1)
    """Maximum length of an answer."""


class ClassifyConfig(FinetuneConfig, LabelledConfig):
    """Fine-tune a model to classify texts."""

    default_epochs: ClassVar[float] = 4

    stage: Literal["classify"] = "classify"
    trained: Literal["head", "last-block", "all"] | None = None
    """What to train: the new head, head + last block + final norm (default), or all weights; with
    --lora.rank, head and adapters."""
    context_length: int | None = Field(None, ge=1)
    """Tokens per text; longer texts are truncated at the end (default: the model's context)."""
    texts_per_step: int = Field(32, ge=1)
    """Texts per optimizer step, a multiple of train.batch_size; with several micro-batches, each
    gets texts of similar length and little padding."""
    train: TrainConfig = TrainConfig(batch_size=16, compile="off")
    eval: EvalConfig = EvalConfig(interval=50)


class PreferenceConfig(FinetuneConfig, PreferenceFiles):
    """Fine-tune a chat model on preferences: pairs of a better and a worse answer (DPO)."""

    default_epochs: ClassVar[float] = 1

    stage: Literal["preference"] = "preference"
    data: tuple[str, ...] = Field(min_length=1)
    """Pairs of answers: files, folders or patterns (.jsonl, .json, .parquet ...), with the columns
    chosen and rejected, texts or messages, and a question, unless they contain it; or `skills`,
    questions of the built-in chat set with a right and a wrong answer. Repeatable."""
    val: tuple[str, ...] = ()
    """Pairs for validation, repeatable (default: a share of the questions)."""
    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the pairs for validation, without --val; pairs with the same question stay
    together."""
    questions: int = Field(4_000, ge=2, le=1_000_000)
    """Number of pairs to generate for the built-in set."""
    context_length: int | None = Field(None, ge=2)
    """Maximum tokens of a question with an answer (default: the model's context)."""
    loss: PreferenceKind = "sigmoid"
    """sigmoid (DPO), ipo, sigmoid_norm (DPO of log-probabilities per token, which does not favour
    long answers), simpo (per token, without a reference)."""
    beta: float | None = Field(None, gt=0)
    """How closely the model keeps to the reference, the model before this tuning; for simpo, scale
    of the margin (default: 0.1 for sigmoid and ipo, 2 for sigmoid_norm and simpo)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are assumed to be in the wrong order."""
    gamma: float = Field(0.5, ge=0)
    """simpo only: the margin by which the better answer is to be ahead."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs per optimizer step, a multiple of train.batch_size; with several micro-batches, each
    gets pairs of similar length and little padding."""
    dropout: float | None = Field(0.0, ge=0, lt=1)
    """Dropout probability of activations; with it, the model would differ from its reference at
    random."""
    train: TrainConfig = TrainConfig(batch_size=8, compile="off")
    """batch_size counts pairs, each of which is two sequences."""
    optim: OptimConfig = OptimConfig(kind="adamw", learning_rate=1e-4, schedule="linear")
    eval: EvalConfig = EvalConfig(interval=50)

    @model_validator(mode="after")
    def _check_loss(self) -> PreferenceConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no effect on ipo: omit it or change the loss")
        return self
