"""Opening, creating and locking a run folder."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from gptsmith import files
from gptsmith.config import diff, flatten
from gptsmith.interop.peft import Adapter
from gptsmith.model import state_dict as model_weights
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.tuning import Tuning
from gptsmith.run import digests, layout, weights
from gptsmith.run import resume as checks
from gptsmith.run.layout import MASK, Which
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import monitor

if TYPE_CHECKING:
    from gptsmith.chat_template.template import ChatTemplate


class Run:
    """A run folder. Made by `open` (for reading) or `create` (locked, for training).

    notice: a line for the user about the weights loaded last, such as that the run is unfinished;
    usually empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        return layout.read_config(self._verified(layout.CONFIG))

    @property
    def stage(self) -> str:
        """The stage that made the run: pretrain, text, chat, instruct, classify or import."""
        return layout.stage_of(self.config)

    @cached_property
    def model_config(self) -> ModelConfig:
        config = layout.read_architecture(self._verified(layout.ARCHITECTURE))
        if config.mask.startswith(f"{MASK}:"):
            self._verified(MASK)
        return config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        self._verified(layout.ROLES)
        return Tokenizer.load(self._verified(layout.TOKENIZER))

    @cached_property
    def chat_template(self) -> "ChatTemplate | None":
        """The chat format of the model; None if it was not fine-tuned for chat."""
        path = self._verified(layout.TEMPLATE)
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
        path = self._verified(layout.TUNING)
        if not path.is_file():
            if (self.path / layout.BASE).exists():
                raise ValueError(f"{self.path} is incomplete: {path.name} is missing")
            return Tuning()
        try:
            return Tuning.model_validate(files.read_json(path))
        except ValidationError as error:
            raise ValueError(f"{path}: {error.errors()[0]['msg']}") from None

    def _verified(self, name: str) -> Path:
        """The path of a file of the folder, which is compared with its digest."""
        digests.check(self.path, name)
        return self.path / name

    # --- opening and creating

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run for reading.

        Raises FileNotFoundError or ValueError that says what the path is instead and what to do.
        """
        path = Path(path)
        if not layout.is_run(path):
            raise layout.not_a_run_error(path)
        run = cls(path)
        _ = run.config, run.model_config  # raises now if they are unreadable
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
        tuning: Tuning | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> "Run":
        """Create a run for training, or resume one; locked until `close` or the process ends.

        config: plain values (str, int, float, bool, None, list, dict). model_config: a mask
        `file.py:function` is copied into the folder as mask.py; `run.model_config.mask` then names
        the copy. corpus: fingerprint of the training data. tuning: which part of the weights is
        trained (default: all of them). base: the weights before training, if a part is trained.
        resume: there must be a checkpoint, and architecture, tokenizer, template, corpus, tuning
        and the `fixed` fields of config (`train.seed`) must not differ, else ValueError with the
        differences.

        Raises ValueError if another process trains here, FileExistsError for a folder that is not
        empty, unless resumed (a run stopped before its first checkpoint counts as empty).
        """
        path, tuning, extra = Path(path), tuning or Tuning(), dict[str, bytes]()
        if code := layout.MASK_CODE.fullmatch(model_config.mask.strip()):
            source = Path(code[1])
            model_config = model_config.change(mask=f"{MASK}:{code[2]}")
            if "model" in config:
                config = {**config, "model": model_config.model_dump(mode="json")}
            # on resume, a mask.py without a folder is the run's own copy
            if source.is_file() and not (resume and source == Path(MASK)):
                extra[MASK] = source.read_bytes()
            elif not (resume and (path / MASK).is_file()):
                raise FileNotFoundError(f"mask {str(source)!r}: there is no such file")
        check = checks.check_resumable if resume else checks.check_unoccupied
        check(path)
        files.make_folder(path)
        run = cls(path).lock()
        try:
            check(path)  # again, now that the folder is locked
            if resume:
                flat = flatten(config)
                new = {
                    **{name: flat.get(name) for name in fixed},
                    "model": model_config.model_dump(),
                    "tokenizer": tokenizer.fingerprint[:12],
                    layout.TEMPLATE: template,
                    "tuning": tuning.model_dump(),
                    "corpus": corpus,
                    **{name: sha256(data).hexdigest()[:12] for name, data in extra.items()},
                }
                run._check_unchanged(new, fixed)
                run.changes = checks.changed_settings(run.config, config)
                run.notice = digests.note(path)
            files.sweep(path)
            checkpoints.clean(run.checkpoints)
            if resume:
                run.resumed = checkpoints.find(run.checkpoints)  # before anything is written
                if (path / layout.BASE).exists():
                    digests.adopt(path, layout.BASE)
            else:  # remains of a run that was stopped before its first checkpoint
                names = (layout.TUNING, layout.BASE, layout.TEMPLATE, layout.ROLES, MASK)
                digests.remove(path, names)
                if not tuning.is_full_finetune:
                    assert base is not None
                    weights.save(path / layout.BASE, base, {})
                    extra[layout.TUNING] = files.json_bytes(tuning.model_dump(mode="json"))
            extra[layout.CORPUS] = files.json_bytes({"fingerprint": corpus})
            if "resume" in config:  # so that config.yaml can start another run
                config = {**config, "resume": False}
            digests.write(path, extra | _contents(config, model_config, tokenizer, template))
        except BaseException:
            run.close()
            raise
        run.__dict__.update(config=config, model_config=model_config, tokenizer=tokenizer)
        run.__dict__.update(template=template, tuning=tuning)
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
        """Create a run from weights trained elsewhere, written one tensor at a time as `dtype`.

        Raises FileExistsError if `path` is occupied, and ValueError, leaving no folder behind, for
        tensors that do not fit model_config or are not finite.
        """
        shapes = model_weights.shapes(model_config)
        tensors = model_weights.validated(model_config, tensors, config["import"])
        with files.atomic_folder(path) as folder:
            with digests.recorded(folder, layout.WEIGHTS) as temporary:
                in_file = {name: (dtype, shape) for name, shape in shapes.items()}
                checkpoints.stream_tensors(temporary, in_file, tensors)
            digests.write(folder, _contents(config, model_config, tokenizer, template))
        return cls.open(path)

    def _check_unchanged(self, new: Mapping[str, Any], fixed: Sequence[str]) -> None:
        recorded, config = self._verified(layout.CORPUS), flatten(self.config)
        old: dict[str, Any] = {
            **{name: config.get(name) for name in fixed},
            "model": self.model_config.model_dump(),
            "tokenizer": self.tokenizer.fingerprint[:12],
            layout.TEMPLATE: self.template,
            "tuning": self.tuning.model_dump(),
            "corpus": files.mapping(files.read_json(recorded), recorded).get("fingerprint")
            if recorded.exists()
            else new["corpus"],
        }
        if MASK in new:
            copy = self.path / MASK
            old[MASK] = files.sha256(copy)[:12] if copy.is_file() else None
        if changes := diff(old, new):
            raise ValueError(
                f"{self.path} cannot be resumed with other settings: {'; '.join(changes)};"
                " use the old values, or another --out"
            )

    def lock(self) -> "Run":
        """Lock the folder until `close`, the end of a `with` block, or of the process."""
        if self._lock is None:
            self._lock = files.lock(self.path / layout.LOCK, "or choose another --out")
        return self

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- weights

    def load_model(
        self,
        checkpoint: Which = "last",
        device: str | torch.device = "cpu",
        trust_code: bool = False,
    ) -> GPTModel:
        """The trained model in eval mode, adapters merged; sets `notice`.

        checkpoint: "last" is the end of training (model.safetensors or adapter/), or the newest
        good checkpoint of an unfinished run; "best" has the lowest validation loss; a number is a
        step. Raises ValueError if there are no weights, if they are damaged, of the wrong shape or
        not finite, and for a mask that is Python code unless trust_code is set.
        """
        return weights.load_model(self, checkpoint, device, trust_code)

    def verify_weights(self) -> None:
        """Compare the final weights with their digests. ValueError naming the damaged file."""
        weights.verify(self)

    def base_model(self, trust_code: bool = False) -> GPTModel:
        """The model that a partly trained run started from, without adapters."""
        return weights.base_model(self, trust_code)

    def load_adapter(self, checkpoint: Which = "last") -> Adapter:
        """A LoRA run's adapter; `notice` and errors as for `load_model`."""
        return weights.load_adapter(self, checkpoint)

    def finish(self, which: Literal["last", "best"] = "last") -> None:
        """Write the final weights, or the adapter, from the newest checkpoint or the best one."""
        weights.finish(self, which)


def _contents(
    config: dict[str, Any], model_config: ModelConfig, tokenizer: Tokenizer, template: str | None
) -> dict[str, bytes]:
    """Files of every run by name; config.yaml is the last, because a folder with it is a run."""
    contents = {name: text.encode() for name, text in tokenizer.contents().items()}
    if template is not None:
        contents[layout.TEMPLATE] = template.encode()
    contents[layout.ARCHITECTURE] = files.json_bytes(model_config.model_dump(mode="json"))
    contents[layout.CONFIG] = layout.yaml_text(config).encode()
    return contents
