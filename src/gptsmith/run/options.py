"""Options of commands that use the weights of a run; this file does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptsmith import terminal
from gptsmith.config import Section
from gptsmith.run import Which

if TYPE_CHECKING:
    import torch

    from gptsmith.model.gpt import GPTModel
    from gptsmith.run import Run

Quantized = Literal["int8", "int4"]


class WeightChoice(Section):
    """Which weights of a run are used, and on which device."""

    checkpoint: Which = "last"
    """Which weights: of the last step, of the best validation loss, or of a kept step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    trust_code: bool = False
    """Allow a mask that is Python code in the run folder."""

    def torch_device(self) -> torch.device:
        from gptsmith.train.runtime import choose_device

        try:
            return choose_device(self.device)
        except ValueError as error:
            raise ValueError(f"--device: {error}") from None

    def load(self, run: Run) -> GPTModel:
        """The model in eval mode on its device; `run.notice` is printed to stderr."""
        model = run.load_model(self.checkpoint, self.torch_device(), self.trust_code)
        if run.notice:
            terminal.note(run.notice)
        return model


class WeightOptions(WeightChoice):
    """Which weights of which run are used, and on which device."""

    run: Path
    """A run folder."""


class Quantization(Section):
    """How weights that text is generated with are stored in memory."""

    quantize: Quantized | None = None
    """Round the weights to 8 or 4 bits when they are loaded, on a CPU: about a quarter or a seventh
    of the memory of float32, and faster. The files of the run stay as they are (default: use the
    weights as they are)."""

    @property
    def engine_weights(self) -> str:
        """The argument `weights` of an Engine."""
        return self.quantize or "auto"


class TextWeightOptions(Quantization, WeightOptions):
    """Weights that text is generated with."""
