"""Opening, making and locking a run folder, and the way of its weights to disk and back."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptsmith import files
from gptsmith.config import diff, flatten, rename_keys
from gptsmith.interop import peft
from gptsmith.interop.peft import Adapter
from gptsmith.model import lora, tuning
from gptsmith.model import state_dict as model_weights
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.tuning import Tuning
from gptsmith.run import layout
from gptsmith.run.layout import MASK
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import monitor, runtime

if TYPE_CHECKING:
    from gptsmith.chat_template import ChatTemplate

_CODE = re.compile(r"(.+\.py):(\w+)")  # a mask that is Python code

Which = Literal["last", "best"] | int


class Run:
    """An open run folder. Make one by `create` (locked, for training) or `open` (to read)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notice = ""  # what the user should hear about the last load, one line; often nothing
        # On resume: the checkpoint to go on from, and what is damaged in newer ones.
        self.resumed: tuple[checkpoints.Checkpoint, list[str]] | None = None
        self._lock: ExitStack | None = None

    # what lies there

    @property
    def weights(self) -> Path:
        """What the end of training leaves: the whole weights, or a LoRA run's adapter."""
        if self.tuning.lora.rank:
            return self.path / layout.ADAPTER / layout.ADAPTER_WEIGHTS
        return self.path / layout.WEIGHTS

    @property
    def checkpoints(self) -> Path:
        return self.path / layout.CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / monitor.METRICS

    @property
    def report(self) -> Path:
        return self.path / layout.REPORT

    @cached_property
    def config(self) -> dict[str, Any]:
        return rename_keys(layout.read_yaml(self.path / layout.CONFIG))

    @cached_property
    def model_config(self) -> ModelConfig:
        return layout.read_architecture(self.path / layout.ARCHITECTURE)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / layout.TOKENIZER)

    @cached_property
    def chat_template(self) -> "ChatTemplate | None":
        """How the model is talked to; None for one that nobody tuned for talking."""
        path = self.path / layout.TEMPLATE
        if not path.is_file():
            return None
        from gptsmith.chat_template import ChatTemplate  # and with it Jinja, 20 ms, for them alone

        text = files.read_text(path)
        try:
            return ChatTemplate(text, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{path} is unusable: {error}") from None

    @cached_property
    def template(self) -> str | None:
        """The source of `chat_template`, Jinja."""
        return None if self.chat_template is None else self.chat_template.source

    @cached_property
    def tuning(self) -> Tuning:
        path = self.path / layout.TUNING
        if not path.is_file():
            if (self.path / layout.BASE).exists():
                raise ValueError(f"{self.path} is incomplete: {path.name} is missing")
            return Tuning()
        try:
            return Tuning.model_validate(files.read_json(path))
        except ValidationError as error:
            raise ValueError(f"{path}: {error.errors()[0]['msg']}") from None

    # opening and making

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """A run to read from. Raises FileNotFoundError or ValueError saying what the path is
        instead and what to do."""
        path = Path(path)
        if not layout.is_run(path):
            raise layout.not_a_run(path)
        run = cls(path)
        _ = run.config, run.model_config  # unreadable ones are told now
        return run

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: dict[str, Any],
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        resume: bool = False,
        *,
        corpus: str | None = None,
        fixed: Sequence[str] = (),
        template: str | None = None,
        tuned: Tuning | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> "Run":
        """A run to train in, locked from now until `close` or the end of the process.

        config: plain values (str, int, float, bool, None, list, dict). A mask `file.py:function`
        is copied in as mask.py; `run.model_config.mask` then names the copy. corpus: fingerprint
        of the training data. tuned, base: what is trained, if it is a part of the weights, and the
        weights that the rest keeps. resume: architecture, tokenizer, template, corpus, tuning and
        the `fixed` fields of config (`train.seed`) must be those of the folder, else ValueError
        with the differences; there must be a checkpoint. Raises ValueError if another process
        trains here, FileExistsError for a folder that is not empty and is not to be resumed (a run
        stopped before its first checkpoint counts as empty).
        """
        path = Path(path)
        tuned = tuned or Tuning()
        code = _CODE.fullmatch(model_config.mask.strip())
        source = Path(code[1]) if code else None
        if resume and source == Path(MASK):
            source = None  # the stored configuration means the run's own copy
        if code:
            model_config = model_config.change(mask=f"{MASK}:{code[2]}")
            if "model" in config:
                config = {**config, "model": model_config.model_dump(mode="json")}
        if source is not None and not source.is_file() and not (resume and (path / MASK).is_file()):
            raise FileNotFoundError(f"mask {str(source)!r}: there is no such file")
        refuse = layout.refuse_unresumable if resume else layout.refuse_occupied
        refuse(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path).lock()
        try:
            refuse(path)  # again, now that nobody else can come in between
            if resume:
                now = {
                    **{name: flatten(config).get(name) for name in fixed},
                    "model": model_config.model_dump(),
                    "tokenizer": tokenizer.fingerprint[:12],
                    layout.TEMPLATE: template,
                    "tuning": tuned.model_dump(),
                    "corpus": corpus,
                }
                run._refuse_changes(now, fixed, source)
            code_of_mask = None if source is None or not source.is_file() else source.read_bytes()
            files.sweep(path)
            checkpoints.clean(run.checkpoints)
            if resume:
                run.resumed = checkpoints.find(run.checkpoints)  # before anything is written
            else:  # what a start left that was stopped before its first checkpoint
                for name in (layout.TUNING, layout.BASE, layout.TEMPLATE, MASK):
                    (path / name).unlink(missing_ok=True)
            if code_of_mask is not None:
                files.write_bytes(path / MASK, code_of_mask)
            tokenizer.save(path / layout.TOKENIZER)
            if template is not None:
                files.write_text(path / layout.TEMPLATE, template)
            if not tuned.is_full_finetune and not resume:
                assert base is not None
                with files.atomic_path(path / layout.BASE) as temporary:
                    checkpoints.save_tensors(temporary, base)
                files.write_json(path / layout.TUNING, tuned.model_dump(mode="json"))
            files.write_json(path / layout.CORPUS, {"fingerprint": corpus})
            files.write_json(path / layout.ARCHITECTURE, model_config.model_dump(mode="json"))
            if "resume" in config:  # whoever starts a new run from this config.yaml
                config = {**config, "resume": False}
            # last: a folder is a run as soon as it has its config.yaml
            files.write_text(path / layout.CONFIG, layout.yaml_text(config))
        except BaseException:
            run.close()
            raise
        run.__dict__.update(config=config, model_config=model_config, tokenizer=tokenizer)
        run.__dict__.update(template=template, tuning=tuned)
        return run

    @classmethod
    def from_weights(
        cls,
        path: str | Path,
        config: dict[str, Any],
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        tensors: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        template: str | None = None,
    ) -> "Run":
        """A run of weights that were trained elsewhere, all of `dtype`, written as they come.

        Whole or not there: FileExistsError if `path` is occupied, ValueError for tensors that do
        not fit model_config or are not finite, and no folder in either case.
        """
        with files.atomic_folder(path) as folder:
            tokenizer.save(folder / layout.TOKENIZER)
            if template is not None:
                files.write_text(folder / layout.TEMPLATE, template)
            checkpoints.stream_tensors(
                folder / layout.WEIGHTS,
                model_weights.shapes(model_config),
                dtype,
                model_weights.validated(model_config, tensors, config["import"]),
            )
            files.write_json(folder / layout.ARCHITECTURE, model_config.model_dump(mode="json"))
            files.write_text(folder / layout.CONFIG, layout.yaml_text(config))
        return cls.open(path)

    def _refuse_changes(self, new: dict[str, Any], fixed: Sequence[str], mask: Path | None) -> None:
        recorded, before = self.path / layout.CORPUS, flatten(self.config)
        old: dict[str, Any] = {
            **{name: before.get(name) for name in fixed},
            "model": self.model_config.model_dump(),
            "tokenizer": files.sha256(self.path / layout.TOKENIZER)[:12],
            layout.TEMPLATE: self.template,
            "tuning": self.tuning.model_dump(),
            "corpus": files.mapping(files.read_json(recorded), recorded).get("fingerprint")
            if recorded.exists()
            else new["corpus"],
        }
        if old["tokenizer"] != new["tokenizer"]:
            _ = self.tokenizer  # a damaged one is told as such
        if mask is not None and mask.is_file():
            copy = self.path / MASK
            old["mask.py"] = files.sha256(copy)[:12] if copy.is_file() else None
            new = {**new, "mask.py": files.sha256(mask)[:12]}
        if changes := diff(old, new):
            raise ValueError(
                f"{self.path} cannot be resumed, it was started otherwise: {'; '.join(changes)};"
                " take the old values, or another --out"
            )

    def lock(self) -> "Run":
        """Hold the folder's lock until `close`, the end of a `with`, or that of the process."""
        if self._lock is None:
            self._lock = files.lock(self.path / layout.LOCK, "or choose another --out")
        return self

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # weights

    def load_model(
        self,
        checkpoint: Which = "last",
        device: str | torch.device = "cpu",
        trust_code: bool = False,
    ) -> GPTModel:
        """The trained model in eval mode, adapters merged; `notice` tells what is unusual about it.

        "last" is the end of training (model.safetensors or adapter/), or the newest good checkpoint
        of a run that was stopped before; "best" has the lowest validation loss; a number is a step.
        Raises ValueError when there are no weights, they are damaged, of another shape or not
        finite, and for a mask that is Python code unless trust_code is set.
        """
        tensors, origin = self._tensors(checkpoint)
        whole = self.tuning.is_full_finetune or origin == self.path / layout.WEIGHTS
        model = self._model(tensors, origin, whole, trust_code)
        return model.to(runtime.choose_device(str(device))).eval()

    def base_model(self, trust_code: bool = False) -> GPTModel:
        """A model with the weights that a partly trained run started from; nothing is attached."""
        origin = self.path / layout.BASE
        return self._model(checkpoints.load_tensors(origin), origin, True, trust_code)

    def load_adapter(self, checkpoint: Which = "last") -> Adapter:
        """A LoRA run's adapter. `notice` and errors as of `load_model`."""
        tensors, _ = self._tensors(checkpoint)
        return Adapter(self.tuning.lora, tensors, self.tuning.token_ids)

    def _model(
        self, tensors: dict[str, Tensor], origin: Path, whole: bool, trust_code: bool
    ) -> GPTModel:
        if whole:
            return model_weights.load(
                self.model_config, tensors, origin, mask_folder=self.path, trust_code=trust_code
            )
        model = self.base_model(trust_code)
        self.tuning.wrap(model)
        tuning.load_trainable_state_dict(model, tensors, origin)
        lora.merge(model)
        return model

    def _tensors(self, which: Which) -> tuple[dict[str, Tensor], Path]:
        """The weights asked for and where they are from: all of them, or those that are trained."""
        self.notice = ""
        header = None if isinstance(which, int) else _header(self.weights)
        steps = checkpoints.steps(self.checkpoints)
        if header is not None and which in ("last", header.get("which")):
            # Training may have gone on since. Foreign weights name no step: they are the end.
            ended = int(header.get("step", sys.maxsize))
            if not any(step > ended for step in steps):
                return self._final_tensors(), self.weights
        if not steps:
            raise ValueError(
                f"{self.path} has no checkpoints, only its final {self.weights.name}"
                if self.weights.exists()
                else f"{self.path} has no weights yet, it was stopped before its first checkpoint:"
                " start it again"
            )
        found, damage = checkpoints.find(self.checkpoints, self._best_step(which))
        if which == "last":
            damage.append(f"{self.path} is unfinished: this is its step {found.step}")
        self.notice = "; ".join(damage)
        return found.load("model"), found.path

    def _final_tensors(self) -> dict[str, Tensor]:
        if not self.tuning.lora.rank:
            return checkpoints.load_tensors(self.weights)
        try:
            return dict(peft.load(self.weights.parent, self.model_config).tensors)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _best_step(self, which: Which) -> Literal["last"] | int:
        """`which`, with "best" replaced by the step that the newest good checkpoint names."""
        if which != "best":
            return which
        state = checkpoints.find(self.checkpoints)[0].state
        if state.get("best_loss") is None:
            raise ValueError(f"{self.path} has no best checkpoint: nothing was evaluated yet")
        return int(state["best_step"])

    def finish(self, which: Literal["last", "best"] = "last") -> None:
        """Write the final weights, or the adapter, from the newest checkpoint or the best one."""
        newest, _ = checkpoints.find(self.checkpoints)
        found, _ = checkpoints.find(self.checkpoints, self._best_step(which))
        tensors, header = found.load("model"), {"which": which, "step": str(newest.step)}
        if self.tuning.lora.rank:
            self.weights.parent.mkdir(exist_ok=True)
            found_adapter = Adapter(self.tuning.lora, tensors, self.tuning.token_ids)
            peft.save(self.weights.parent, self.model_config, found_adapter, header)
            return
        if not self.tuning.is_full_finetune:
            tensors = self._model(tensors, found.path, False, trust_code=True).state_dict()
        self.save_weights(tensors, header)

    def save_weights(self, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
        """Write the final weights durably. header: `which` ("last" or "best") and the `step` at
        which training ended; empty for weights that were not trained here."""
        with files.atomic_path(self.weights) as temporary:
            checkpoints.save_tensors(temporary, tensors, header)


def _header(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file, None if there is no file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; --checkpoint STEP opens another") from None
