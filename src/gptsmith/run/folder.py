"""A run folder: its files, its lock and its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptsmith import files
from gptsmith.interop import peft
from gptsmith.interop.peft import Adapter
from gptsmith.model import lora
from gptsmith.model import state_dict as model_weights
from gptsmith.model.config import ModelConfig, Quantization
from gptsmith.model.gpt import GPTModel
from gptsmith.model.quantized import replace_linears, restore_linears
from gptsmith.model.tuning import Tuning, load_trainable_state_dict
from gptsmith.run import digests, layout
from gptsmith.run.layout import MASK, CheckpointName
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import monitor, runtime

if TYPE_CHECKING:
    from gptsmith.chat_template.template import ChatTemplate

T = TypeVar("T")


class Run:
    """A run folder, opened by `open` for reading or by create.open_for_training.

    notice: a line for the user about the weights that were loaded last, for example that the run is
    unfinished; usually empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / layout.CHECKPOINTS
        self.metrics = path / monitor.METRICS
        self.report = path / layout.REPORT
        self.notice = ""
        # On resume: the checkpoint to continue from, and the damage found in newer ones.
        self.resumed: tuple[checkpoints.Checkpoint, list[str]] | None = None
        self.changes: list[str] = []  # of the configuration, on resume
        self._lock: ExitStack | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # --- content

    @property
    def weights(self) -> Path:
        """File of the final weights: of the whole model, or of a LoRA run's adapter."""
        if self.tuning.lora.rank:
            return self.path / layout.ADAPTER / layout.ADAPTER_WEIGHTS
        return self.path / layout.WEIGHTS

    @cached_property
    def config(self) -> dict[str, Any]:
        return layout.read_config(self.verified(layout.CONFIG))

    @property
    def stage(self) -> str:
        """The stage that made the run: pretrain, chat, preference, import ... (see stage_of)."""
        return layout.stage_of(self.config)

    @cached_property
    def model_config(self) -> ModelConfig:
        config = layout.read_architecture(self.verified(layout.ARCHITECTURE))
        if config.mask.startswith(f"{MASK}:"):
            self.verified(MASK)
        return config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        self.verified(layout.ROLES)
        return Tokenizer.load(self.verified(layout.TOKENIZER))

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat format of the model; None if it was not fine-tuned for chat."""
        path = self.verified(layout.TEMPLATE)
        if not path.is_file():
            return None
        from gptsmith.chat_template.template import ChatTemplate  # Jinja takes 20 ms to import

        text = files.read_text(path)
        try:
            return ChatTemplate(text, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{path} is unusable: {error}") from None

    @cached_property
    def template(self) -> str | None:
        """The Jinja source of `chat_template`."""
        return None if self.chat_template is None else self.chat_template.source

    @cached_property
    def tuning(self) -> Tuning:
        """Which part of the weights the run trains."""
        path = self.verified(layout.TUNING)
        if not path.is_file():
            if (self.path / layout.BASE).exists():
                raise ValueError(f"{self.path} is incomplete: {path.name} is missing")
            return Tuning()
        try:
            return Tuning.model_validate(files.read_json(path))
        except ValidationError as error:
            raise ValueError(f"{path}: {error.errors()[0]['msg']}") from None

    def verified(self, name: str) -> Path:
        """The path of a file in the folder, after comparing it with its digest."""
        if name in (layout.TEMPLATE, layout.ROLES):  # no other file says whether the run has one
            digests.check_not_added(self.path, name)
        digests.check(self.path, name)
        return self.path / name

    # --- opening

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run for reading.

        Raises FileNotFoundError or ValueError that says what the path is instead, and the remedy.
        """
        path = Path(path)
        if not layout.is_run(path):
            raise layout.not_a_run_error(path)
        run = cls(path)
        _ = run.config, run.model_config  # raises now if they are unreadable
        return run

    def lock(self) -> Run:
        """Lock the folder until `close`, the end of a `with` block, or of the process."""
        if self._lock is None:
            self._lock = files.lock(self.path / layout.LOCK, "or choose another --out")
        return self

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- weights

    def load_model(
        self,
        checkpoint: CheckpointName = "last",
        device: str | torch.device = "cpu",
        trust_code: bool = False,
    ) -> GPTModel:
        """The trained model in eval mode, adapters merged; sets `notice`.

        checkpoint: "last" is the end of training (model.safetensors or adapter/), or the newest
        good checkpoint of an unfinished run; "best" has the lowest validation loss; a number is a
        step. Raises ValueError if there are no weights, if they are damaged, of the wrong shape or
        not finite, and for a mask that is Python code unless trust_code is set.
        """
        tensors, source = self._tensors(checkpoint)
        if self.tuning.is_full_finetune or source == self.path / layout.WEIGHTS:
            model = self._complete_model(tensors, source, trust_code)
        else:
            model = self._tuned_model(tensors, source, trust_code)
        return model.to(runtime.choose_device(str(device))).eval()

    def load_for_training(
        self,
        checkpoint: CheckpointName = "last",
        quantize: Quantization | None = None,
        trust_code: bool = False,
    ) -> GPTModel:
        """`load_model` in fp32 on the CPU, to train it further.

        quantize: format of the linear layers of the blocks. Weights that are in one file are read
        tensor by tensor, so memory is needed for the model alone; others are merged first.
        """

        def read() -> GPTModel | None:
            chosen = self._choose(checkpoint)
            if not self._is_complete(chosen):
                return None
            stored = (
                checkpoints.StoredTensors(self.weights)
                if chosen is None
                else chosen.stored("model")
            )
            return model_weights.load_in_fp32(
                self.model_config, stored, stored.path, quantize=quantize,
                mask_folder=self.path, trust_code=trust_code,
            )  # fmt: skip

        model = self._retried(read)
        if model is None:
            model = self.load_model(checkpoint, trust_code=trust_code).float()
            if quantize:
                replace_linears(model, quantize)
        return model.eval()

    def base_model(self, trust_code: bool = False, *, quantized: bool = False) -> GPTModel:
        """The model that a partly trained run started from, without adapters.

        quantized: quantized layers stay so; otherwise they become plain ones with the same weights.
        """
        source = self.verified(layout.BASE)
        model = self._complete_model(
            checkpoints.load_tensors(source), source, trust_code, self.tuning.quantize
        )
        if not quantized:
            restore_linears(model)
        return model

    def load_adapter(self, checkpoint: CheckpointName = "last") -> Adapter:
        """A LoRA run's adapter; `notice` and errors as for `load_model`."""
        tensors, _ = self._tensors(checkpoint)
        return Adapter(self.tuning.lora, tensors, self.tuning.token_ids)

    def verify_weights(self) -> None:
        """Compare the final weights with their digests. ValueError naming the damaged file."""
        remedy = "restore it from a copy, or open a checkpoint with --checkpoint STEP"
        names = [layout.WEIGHTS]
        if self.tuning.lora.rank:
            names = [layout.BASE, *(f"{layout.ADAPTER}/{n}" for n in (peft.CONFIG, peft.WEIGHTS))]
        for name in names:
            if (self.path / name).exists():
                digests.check(self.path, name, remedy)

    def finish(self, which: Literal["last", "best"] = "last") -> None:
        """Write the final weights, or the adapter, from the newest checkpoint or the best one."""
        newest, damage = checkpoints.find(self.checkpoints)
        if damage:
            raise ValueError(f"{'; '.join(damage)}; --resume trains again from step {newest.step}")
        chosen, _ = checkpoints.find(self.checkpoints, self._best_step(which))
        tensors, header = chosen.load("model"), {"which": which, "step": str(newest.step)}
        if self.tuning.lora.rank:
            self.weights.parent.mkdir(exist_ok=True)
            adapter = Adapter(self.tuning.lora, tensors, self.tuning.token_ids)
            peft.save(
                self.weights.parent, self.model_config, adapter, header,
                atomic=lambda path: digests.recorded(self.path, f"{layout.ADAPTER}/{path.name}"),
            )  # fmt: skip
            return
        if not self.tuning.is_full_finetune:
            tensors = self._tuned_model(tensors, chosen.path, trust_code=True).state_dict()
        self.write_weights(layout.WEIGHTS, tensors, header)

    def write_weights(
        self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Write a weights file durably, after recording its digest.

        header: `which` ("last" or "best") and the `step` at which training ended; none for weights
        that were not trained here.
        """
        with digests.recorded(self.path, name) as temporary:
            checkpoints.save_tensors(temporary, tensors, header)

    def _complete_model(
        self,
        tensors: dict[str, Tensor],
        source: Path,
        trust_code: bool,
        quantized: Quantization | None = None,
    ) -> GPTModel:
        return model_weights.load(
            self.model_config, tensors, source, quantized=quantized,
            mask_folder=self.path, trust_code=trust_code,
        )  # fmt: skip

    def _tuned_model(self, tensors: dict[str, Tensor], source: Path, trust_code: bool) -> GPTModel:
        """The base model with these trained weights, adapters merged."""
        model = self.base_model(trust_code, quantized=True)
        self.tuning.wrap(model)
        load_trainable_state_dict(model, tensors, source)
        lora.merge(model)
        return model

    def _tensors(self, which: CheckpointName) -> tuple[dict[str, Tensor], Path]:
        """The requested weights (all, or the trained ones), and their file or folder."""

        def read() -> tuple[dict[str, Tensor], Path]:
            chosen = self._choose(which)
            if chosen is None:
                return self._final_tensors(), self.weights
            return chosen.load("model"), chosen.path

        return self._retried(read)

    def _retried(self, read: Callable[[], T]) -> T:
        for _ in range(10):
            try:
                return read()
            except FileNotFoundError:  # pruned by the process that trains here: look again
                continue
        return read()

    def _is_complete(self, chosen: checkpoints.Checkpoint | None) -> bool:
        """Whether what `_choose` has found are all weights of the model."""
        return self.tuning.is_full_finetune or (chosen is None and not self.tuning.lora.rank)

    def _choose(self, which: CheckpointName) -> checkpoints.Checkpoint | None:
        """Where the requested weights are; None: they are the final ones. Sets `notice`."""
        self.notice = digests.unverified_note(self.path)
        header = None if isinstance(which, int) else self._header()
        steps = checkpoints.steps(self.checkpoints)
        if header is not None and which in ("last", header.get("which")):
            # Training may have continued since. Imported weights have no step: they are final.
            last_step = int(header.get("step", sys.maxsize))
            if not any(step > last_step for step in steps):
                return None
        if not steps:
            raise ValueError(
                f"{self.path} has no checkpoints, only its final {self.weights.name}"
                if self.weights.exists()
                else f"{self.path} has no weights yet, it was stopped before its first checkpoint:"
                " start it again"
            )
        chosen, damage = checkpoints.find(self.checkpoints, self._best_step(which))
        if which == "last":
            damage.append(f"{self.path} is unfinished: this is its step {chosen.step}")
        self.notice = "; ".join([*filter(None, [self.notice]), *damage])
        return chosen

    def _header(self) -> dict[str, str] | None:
        """The metadata of the final weights, which are verified; None if there are none."""
        path = self.weights
        if not path.exists():
            return None
        self.verify_weights()
        with path.open("rb"):  # an unreadable file is not a damaged one
            pass
        try:
            with files.open_safetensors(path, lambda: safe_open(path, "pt")) as file:
                return file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged: {error}; --checkpoint STEP opens another"
            ) from None

    def _final_tensors(self) -> dict[str, Tensor]:
        if not self.tuning.lora.rank:
            return checkpoints.load_tensors(self.weights)
        try:
            return dict(peft.load(self.weights.parent, self.model_config).tensors)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _best_step(self, which: CheckpointName) -> Literal["last"] | int:
        """`which`, with "best" replaced by the best step, which the newest checkpoint names."""
        if which != "best":
            return which
        state = checkpoints.find(self.checkpoints)[0].state
        if state.get("best_loss") is None:
            raise ValueError(f"{self.path} has no best checkpoint: nothing was evaluated yet")
        return int(state["best_step"])
