"""What to do when a device has too little memory for a run."""

from __future__ import annotations

import shutil

import torch

from gptsmith.recipes.options import RecipeConfig
from gptsmith.recipes.plan import Plan
from gptsmith.run import Run
from gptsmith.train import distributed


def out_of_memory(
    error: torch.OutOfMemoryError, run: Run, plan: Plan[RecipeConfig], step: int, T: int
) -> ValueError:
    """The error for the user, after `step` steps with rows of T tokens, with the notes of `error`.
    A run without a step leaves its folder free for another attempt."""
    train = plan.config.train
    B = train.batch_size
    if run.resumed:  # and possibly not loaded yet
        step = max(step, run.resumed[0].step)
    if step == 0:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    remedies = []
    if distributed.world_size() > 1 and not train.shard:
        remedies.append("--train.shard")
    if not train.activation_checkpointing:
        remedies.append("--train.activation-checkpointing")
    if B > 1:
        rows = plan.rows_per_step
        smaller = max(n for n in range(1, B // 2 + 1) if rows % n == 0)  # a step of as many rows
        remedies.append(f"--train.batch-size {smaller} --train.total-batch-tokens {rows * T}")
    remedy = ", or ".join(remedies) or "a smaller model or context"
    found = ValueError(
        f"{plan.runtime.device} is out of memory with train.batch_size {B}, after {step:,} steps: "
        f"{'free some and --resume, or start another run: ' if step else ''}try {remedy}"
    )
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found
