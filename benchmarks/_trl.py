"""What the comparisons with TRL's trainers share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def step_clock() -> Any:
    """A callback that times a trainer's steps from the end of the first one: `seconds()` returns
    wall-clock and CPU seconds up to the end of the last."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.marks: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append((time.perf_counter(), time.process_time()))

        def seconds(self) -> tuple[float, float]:
            (wall, cpu), (wall_end, cpu_end) = self.marks[0], self.marks[-1]
            return wall_end - wall, cpu_end - cpu

    return Clock()


def tokenizer_of(folder: Path) -> Any:
    """That of an exported model, as a trainer needs it."""
    import tokenizers
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
        eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
