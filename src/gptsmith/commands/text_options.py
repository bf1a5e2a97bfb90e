"""What the commands that generate text have in common; this file does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptsmith.generate.options import SamplingConfig
from gptsmith.run.options import Speculation, TextWeightOptions

if TYPE_CHECKING:
    from gptsmith.generate.engine import Engine
    from gptsmith.model.gpt import GPTModel
    from gptsmith.run import Run


class TextOptions(SamplingConfig, Speculation, TextWeightOptions):
    """Which model generates text, and how."""

    def engine(self, run: Run, model: GPTModel) -> Engine:
        """The engine of a run's model, whose own weights are freed where the engine copies them."""
        from gptsmith.generate.engine import Engine

        return Engine(
            model,
            run.tokenizer,
            weights=self.engine_weights,
            keep_model=False,
            draft_model=self.load_draft(run),
            draft_tokens=self.draft_tokens,
        )
