"""Configuration of the optimizer; this file does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gptsmith.flags import Section  # not config: needs pydantic only

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
TrainingPrecision = Literal[PrecisionName, "fp8"]
CompileMode = Literal["auto", "on", "off"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
DecayStart = Literal["after-warmup", "first-step"]
PreferenceKind = Literal["sigmoid", "ipo", "sigmoid_norm", "simpo"]


class OptimConfig(Section):
    """Optimizer and learning rate."""

    kind: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices inside the blocks (AdamW for the rest), or AdamW for everything."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    embedding_lr_scale: float = Field(1.0, gt=0)
    """Muon only: factor on the learning rate of the parameters that AdamW trains (embeddings,
    norms)."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled, on matrices only."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's Nesterov momentum."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the norm of the whole gradient to this value; 0 disables clipping."""
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(20, ge=0)
    """Steps before the learning rate reaches its peak; shorter runs warm up for half of their
    steps."""
    decay_start: DecayStart = "after-warmup"
    """Where the decay begins. first-step: at step 0, multiplied by the warm-up, so the peak is not
    reached, as in runs of earlier versions."""
    min_lr_ratio: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end of the run, as a fraction of the peak."""
    decay_fraction: float = Field(0.3, gt=0, le=1)
    """wsd only: final fraction of the run over which the learning rate decays."""
