"""Configuration of reinforcement learning; torch is not needed to read it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from gptsmith.data.options import PromptFiles
from gptsmith.evaluate.options import JudgeOptions
from gptsmith.recipes.options import EvalConfig, FinetuneConfig, MonitorConfig, TrainConfig
from gptsmith.train.options import OptimConfig


class RewardEvalConfig(EvalConfig):
    """Evaluation during training: completions of the validation prompts (see --val-prompts)."""

    interval: int = Field(20, ge=0)
    """Steps between evaluations; 0: at the end only."""
    # No options here: validation is counted in prompts, and samples are completions of the data.
    tokens: ClassVar[None] = None  # type: ignore[misc]
    prompt: ClassVar[str] = ""  # type: ignore[misc]
    sample_tokens: ClassVar[int] = 0  # type: ignore[misc]


class RewardConfig(FinetuneConfig, PromptFiles):
    """Reinforcement learning: practise on prompts, by a reward of the completions (GRPO)."""

    default_epochs: ClassVar[float] = 1

    stage: Literal["reward"] = "reward"
    data: tuple[str, ...] = Field(min_length=1)
    """Prompts: files, folders or patterns (.jsonl, .parquet, .csv ...), or `skills`, questions of
    the built-in chat set. Repeatable."""
    val: tuple[str, ...] = ()
    """Prompts for validation, repeatable (default: a share of the data; for `skills`, questions
    with held-out arguments)."""
    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the prompts for validation, without --val."""
    val_prompts: int = Field(200, ge=1)
    """Maximum number of validation prompts; they are answered greedily at each evaluation."""
    questions: int = Field(20_000, ge=2, le=1_000_000)
    """Number of questions to generate for the built-in set."""
    reward: tuple[str, ...] = Field(("exact",), min_length=1)
    """Reward of a completion, repeatable: exact or number (1 if it is the expected answer, or has
    its last number), regex:PATTERN, length:TOKENS (1 up to this length, falling to 0 at twice it),
    judge (see --judge.url), FILE.py:FUNCTION of prompt, completion and row (with --trust-code), or
    URL#LABEL, the probability of a label by a classifier."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in the sum (default: 1 each), in the same order."""
    judge: JudgeOptions = JudgeOptions()
    prompts_per_step: int = Field(16, ge=1)
    """Prompts per rollout."""
    group_size: int = Field(8, ge=2)
    """Completions of each prompt; their mean reward is the baseline of its advantages."""
    max_new_tokens: int = Field(128, ge=1)
    """Maximum length of a completion in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the policy that is trained is the one at this temperature."""
    updates: int = Field(1, ge=1)
    """Optimizer steps on each rollout."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """Clip the ratio to the policy that wrote a completion at 1 - this; without effect for one
    update."""
    clip_high: float = Field(0.2, ge=0)
    """Clip the ratio at 1 + this."""
    kl: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the model before training (beta); above 0, all weights are
    kept a second time, except with LoRA."""
    advantages: Literal["scaled", "centred"] = "scaled"
    """scaled: divided by the standard deviation of their group, as in GRPO; centred: not divided,
    as in Dr. GRPO."""
    credit: Literal["completion", "prefix"] = "completion"
    """Which tokens get an advantage: all of a completion, as in GRPO, or those that made the
    difference, by the mean reward of the completions of the group that begin alike; for short
    answers, of which a group has several with the same beginning."""
    normalize: Literal["token", "sequence", "constant"] = "token"
    """Divide the loss by the tokens of all completions (DAPO), each completion's by its own length
    (GRPO), or all by max_new_tokens (Dr. GRPO)."""
    mask_truncated: bool = False
    """Do not train on completions that reached max_new_tokens."""
    context_length: int | None = Field(None, ge=2)
    """Tokens of a prompt and its completion (default: the model's context)."""
    dropout: float | None = 0.0
    """Always 0: completions are sampled without dropout."""
    train: TrainConfig = TrainConfig(compile="off")
    optim: OptimConfig = OptimConfig(
        learning_rate=3e-4, schedule="linear", weight_decay=0.0, warmup_steps=10
    )
    eval: RewardEvalConfig = RewardEvalConfig()
    monitor: MonitorConfig = MonitorConfig(log_interval=1)

    @model_validator(mode="after")
    def _check(self) -> RewardConfig:
        if twice := next((n for n in self.reward if self.reward.count(n) > 1), None):
            raise ValueError(
                f"reward {twice} is given twice: give it once, and raise its reward_weights"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"{len(self.reward_weights)} reward_weights for {len(self.reward)} rewards: give "
                "one for each"
            )
        for name, dropout in (("dropout", self.dropout), ("lora.dropout", self.lora.dropout)):
            if dropout != 0:
                raise ValueError(
                    f"{name} {dropout}: completions are sampled without it, so that the ratio of "
                    "policies would be noise; omit it"
                )
        if self.train.compile == "on":
            raise ValueError("train.compile on: completions have many lengths; omit it")
        return self
