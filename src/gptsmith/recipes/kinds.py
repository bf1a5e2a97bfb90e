"""The kinds of fine-tuning; torch is not needed to read their configurations."""

from __future__ import annotations

from gptsmith.recipes.options import (
    ChatConfig,
    ClassifyConfig,
    FinetuneConfig,
    InstructConfig,
    PreferenceConfig,
    TextConfig,
)
from gptsmith.recipes.reward_options import RewardConfig

FINETUNE: dict[str, tuple[type[FinetuneConfig], str]] = {
    "text": (TextConfig, "gptsmith.recipes.pretrain:continue_pretraining"),
    "chat": (ChatConfig, "gptsmith.recipes.chat:chat"),
    "instruct": (InstructConfig, "gptsmith.recipes.instruct:instruct"),
    "classify": (ClassifyConfig, "gptsmith.recipes.classify:classify"),
    "preference": (PreferenceConfig, "gptsmith.recipes.preference:preference"),
    "reward": (RewardConfig, "gptsmith.recipes.reward:reward"),
}
"""Kind of fine-tuning -> its configuration and its recipe, a function of (config, started)."""
