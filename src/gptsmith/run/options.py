"""Options of commands that use the weights of a run; this file does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gptsmith import terminal
from gptsmith.config import Section
from gptsmith.run import CheckpointName

if TYPE_CHECKING:
    import torch

    from gptsmith.model.gpt import GPTModel
    from gptsmith.run import Run

Quantized = Literal["int8", "int4"]
WeightType = Literal["auto", "float32", "bfloat16", "float16"]


class WeightChoice(Section):
    """Which weights of a run are used, and on which device."""

    checkpoint: CheckpointName = "last"
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
        return self._load(run, self.checkpoint)

    def _load(self, run: Run, checkpoint: CheckpointName) -> GPTModel:
        model = run.load_model(checkpoint, self.torch_device(), self.trust_code)
        if run.notice:
            terminal.note(run.notice)
        return model


class WeightOptions(WeightChoice):
    """Which weights of which run are used, and on which device."""

    run: Path
    """A run folder."""


class Quantization(WeightChoice):
    """How weights that text is generated with are stored in memory."""

    dtype: WeightType = "auto"
    """Convert the weights to this type when they are loaded, and compute in it: bfloat16 takes half
    the memory of float32 and is several times as fast on a GPU; float16 is for GPUs (default: as
    they are stored)."""
    quantize: Quantized | None = None
    """Round the weights to 8 or 4 bits when they are loaded, on a CPU: about a quarter or a seventh
    of the memory of float32, and faster. The files of the run stay as they are (default: use the
    weights as they are)."""

    def _load(self, run: Run, checkpoint: CheckpointName) -> GPTModel:
        """As WeightChoice._load, converted to `dtype`."""
        import torch

        if self.dtype == "float16" and self.torch_device().type == "cpu":
            raise ValueError("--dtype float16 is for GPUs: use bfloat16 or float32 on a CPU")
        model = super()._load(run, checkpoint)
        return model if self.dtype == "auto" else model.to(getattr(torch, self.dtype))

    @property
    def engine_weights(self) -> str:
        """The argument `weights` of an Engine."""
        return self.quantize or "auto"


class Speculation(Quantization):
    """How tokens are guessed, for the model to verify several at once: the text stays the same."""

    draft: Path | None = None
    """Folder of a smaller run with the same tokenizer, which guesses the next tokens; --dtype and
    --quantize apply to it, too (default: no guesses, or with --draft-tokens from the text
    itself)."""
    draft_tokens: int | None = Field(None, ge=0, le=64)
    """Guesses that are verified in a step, at most (default: 4 with --draft, otherwise 0)."""

    def load_draft(self, run: Run) -> GPTModel | None:
        """The model of `draft`, on the device and in the `dtype` of the run's model. ValueError if
        its tokenizer is not that of the run."""
        from gptsmith.run import Run

        if self.draft is None:
            return None
        other = Run.open(self.draft)
        mine, vocab = run.tokenizer.vocab, other.tokenizer.vocab
        if other.model_config.labels:
            raise ValueError(f"--draft {self.draft} is a classifier, which generates no text")
        if vocab != mine:
            differing = {*mine.items()} ^ {*vocab.items()}
            name, i = min(differing, key=lambda item: item[1])
            raise ValueError(
                f"--draft {self.draft}: its tokenizer ({len(vocab):,} tokens) is not that of"
                f" {run.path} ({len(mine):,}); they differ in token {i}, {name!r:.40}"
            )
        return self._load(other, "last")


class TextWeightOptions(Quantization, WeightOptions):
    """Weights that text is generated with."""
