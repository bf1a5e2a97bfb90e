"""Which weights of a run a command takes, and where they work."""

import sys
from pathlib import Path

import torch

from gptsmith.config import Section
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run, Which
from gptsmith.train.runtime import choose_device


class WeightOptions(Section):
    """Which weights of which run."""

    run: Path
    """A run folder."""
    checkpoint: Which = "last"
    """Which weights: of the last step, of the best validation loss, or of a step that was kept."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    trust_code: bool = False
    """Allow a mask that is Python code in the run folder."""

    def where(self) -> torch.device:
        try:
            return choose_device(self.device)
        except ValueError as error:
            raise ValueError(f"--device: {error}") from None

    def load(self, run: Run) -> GPTModel:
        """The model; what is unusual about its weights is said on stderr."""
        model = run.load_model(self.checkpoint, self.where(), self.trust_code)
        if run.notice:
            print(run.notice, file=sys.stderr)
        return model
