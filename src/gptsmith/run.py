"""The run folder: what every stage takes and leaves. The only file that knows its layout.

runs/NAME/
  config.yaml            resolved configuration of the stage that wrote it
  model.json             architecture (ModelConfig); mask.py beside it if the mask is code
  tokenizer.json         corpus.json: fingerprint of the corpus that it is trained on
  model.safetensors      weights at the end of training; its header says which and of what step
  checkpoints/           resumable state (train/checkpoint.py)
  metrics.jsonl ...      the record of training and what is drawn from it (train/monitor.py)
  report.md
  .lock                  flock of the process that trains here; its id inside
"""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptsmith import files
from gptsmith.differences import diff, recipe_changes
from gptsmith.model import weights as model_weights
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import monitor, precision
from gptsmith.train.trackers import flatten

CONFIG, ARCHITECTURE, WEIGHTS, MASK = "config.yaml", "model.json", "model.safetensors", "mask.py"
TOKENIZER, CORPUS, REPORT = "tokenizer.json", "corpus.json", "report.md"
CHECKPOINTS, LOCK = "checkpoints", ".lock"
_CODE = re.compile(r"(.+\.py):(\w+)")  # a mask that is Python code

Which = Literal["last", "best"] | int


class Run:
    """An open run folder. Make one by `create` (locked, for training) or `open` (to read)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notice = ""  # what the user should hear about the last load, one line; often nothing
        self._lock: IO[str] | None = None

    # where things lie

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / monitor.METRICS

    @property
    def table(self) -> Path:
        return self.path / monitor.TABLE

    @property
    def curves(self) -> Path:
        return self.path / monitor.CURVES

    @property
    def samples(self) -> Path:
        return self.path / monitor.SAMPLES

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @cached_property
    def config(self) -> dict[str, Any]:
        return _read_yaml(self.path / CONFIG)

    @cached_property
    def model_config(self) -> ModelConfig:
        return _read_architecture(self.path / ARCHITECTURE)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / TOKENIZER)

    # opening and making

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """A run to read from. Raises FileNotFoundError or ValueError saying what the path is
        instead and what to do."""
        path = Path(path)
        if not _is_run(path):
            raise _not_a_run(path)
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
    ) -> "Run":
        """A run to train in, locked from now until `close` or the end of the process.

        config: plain values (str, int, float, bool, None, list, dict). A mask `file.py:function`
        is copied in as mask.py; `run.model_config.mask` then names the copy. corpus: fingerprint
        of the training data. resume: architecture, tokenizer, corpus and the `fixed` fields of
        config (`train.seed`) must be those of the folder, else ValueError with the differences;
        there must be a checkpoint. Raises ValueError
        if another process trains here, FileExistsError for a folder that is not empty and is not
        to be resumed (a run stopped before its first checkpoint counts as empty).
        """
        path = Path(path)
        code = _CODE.fullmatch(model_config.mask.strip())
        source = Path(code[1]) if code else None
        if resume and source == Path(MASK):
            source = None  # the stored configuration means the run's own copy
        if code:
            model_config = model_config.change(mask=f"{MASK}:{code[2]}")
            config = {**config, "model": model_config.model_dump(mode="json")}
        if source is not None and not source.is_file() and not (resume and (path / MASK).is_file()):
            raise FileNotFoundError(f"mask {str(source)!r}: there is no such file")
        refuse = _refuse_unresumable if resume else _refuse_occupied
        refuse(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path).lock()
        try:
            refuse(path)  # again, now that nobody else can come in between
            if resume:
                run._refuse_changes(config, fixed, model_config, tokenizer, corpus, source)
            files.sweep(path)
            checkpoints.clean(run.checkpoints)
            if source is not None and source.is_file():
                files.write_bytes(path / MASK, source.read_bytes())
            tokenizer.save(path / TOKENIZER)
            files.write_json(path / CORPUS, {"fingerprint": corpus})
            files.write_json(path / ARCHITECTURE, model_config.model_dump(mode="json"))
            if "resume" in config:  # whoever starts a new run from this config.yaml
                config = {**config, "resume": False}
            # last: a folder is a run as soon as it has its config.yaml
            files.write_text(
                path / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            )
        except BaseException:
            run.close()
            raise
        run.__dict__.update(config=config, model_config=model_config, tokenizer=tokenizer)
        return run

    def _refuse_changes(
        self,
        config: dict[str, Any],
        fixed: Sequence[str],
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        corpus: str | None,
        mask: Path | None,
    ) -> None:
        recorded = self.path / CORPUS
        before, now = flatten(self.config), flatten(config)
        old: dict[str, Any] = {
            **{name: before.get(name) for name in fixed},
            "model": self.model_config.model_dump(),
            "tokenizer": files.sha256(self.path / TOKENIZER)[:12],
            "corpus": files.read_json(recorded)["fingerprint"] if recorded.exists() else corpus,
        }
        new: dict[str, Any] = {
            **{name: now.get(name) for name in fixed},
            "model": model_config.model_dump(),
            "tokenizer": tokenizer.fingerprint[:12],
            "corpus": corpus,
        }
        if mask is not None and mask.is_file():
            old["mask.py"] = (
                files.sha256(self.path / MASK)[:12] if (self.path / MASK).is_file() else None
            )
            new["mask.py"] = files.sha256(mask)[:12]
        if changes := diff(old, new):
            raise ValueError(
                f"{self.path} cannot be resumed, it was started otherwise: {'; '.join(changes)};"
                " take the old values, or another --out"
            )

    @staticmethod
    def with_stored_recipe(argv: Sequence[str]) -> list[str]:
        """On --resume, the arguments with RUN/config.yaml in the place of the recipe: it records
        what the first start chose. Flags still come after it.

        Raises ValueError with the differences when the recipe that is given says otherwise.
        """
        argv = list(argv)
        out = next((b for a, b in pairwise(argv) if a == "--out"), None)
        out = next((a[6:] for a in argv if a.startswith("--out=")), out)
        stored = Path(out or "", CONFIG)
        if "--resume" not in argv or out is None or not stored.is_file():
            return argv
        flags = {a.partition("=")[0][2:].replace("-", "_") for a in argv if a.startswith("--")}
        for i, word in enumerate(argv):
            if word.endswith((".yaml", ".yml")) and not word.startswith("-"):
                if changes := recipe_changes(_read_yaml(Path(word)), _read_yaml(stored), flags):
                    raise ValueError(
                        f"{word} is not what {out} was started with: {'; '.join(changes)};"
                        " leave the recipe away, or give a change that is meant as a flag"
                    )
                return [*argv[:i], str(stored), *argv[i + 1 :]]
        return [str(stored), *argv]

    def lock(self) -> "Run":
        """Hold the folder's lock until `close`, the end of a `with`, or that of the process."""
        if self._lock is None:
            self._lock = files.lock(self.path / LOCK, "or choose another --out")
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
        """The trained model in eval mode; `notice` tells what is unusual about it.

        "last" is the end of training (model.safetensors), or the newest good checkpoint of a run
        that was stopped before; "best" has the lowest validation loss; a number is a step. Raises
        ValueError when there are no weights, they are damaged, of another shape or not finite,
        and for a mask that is Python code unless trust_code is set.
        """
        tensors, origin = self._tensors(checkpoint)
        model = model_weights.load(
            self.model_config, tensors, origin, mask_folder=self.path, trust_code=trust_code
        )
        return model.to(precision.choose_device(str(device))).eval()

    def _tensors(self, which: Which) -> tuple[dict[str, Tensor], Path]:
        self.notice = ""
        header = None if isinstance(which, int) else _header(self.weights)
        steps = checkpoints.steps(self.checkpoints)
        if header is not None and which in ("last", header.get("which")):
            # Training may have gone on since. Foreign weights name no step: they are the end.
            ended = int(header.get("step", sys.maxsize))
            if not any(step > ended for step in steps):
                return checkpoints.load_tensors(self.weights), self.weights
        if not steps:
            raise ValueError(
                f"{self.path} has no checkpoints, only its final {WEIGHTS}"
                if self.weights.exists()
                else f"{self.path} has no weights yet, it was stopped before its first checkpoint:"
                " start it again"
            )
        found, damage = checkpoints.find(self.checkpoints, self._best_step(which))
        if which == "last":
            damage.append(f"{self.path} is unfinished: this is its step {found.step}")
        self.notice = "; ".join(damage)
        return found.load("model"), found.path

    def _best_step(self, which: Which) -> Literal["last"] | int:
        """`which`, with "best" replaced by the step that the newest good checkpoint names."""
        if which != "best":
            return which
        state = checkpoints.find(self.checkpoints)[0].state
        if state.get("best_loss") is None:
            raise ValueError(f"{self.path} has no best checkpoint: nothing was evaluated yet")
        return int(state["best_step"])

    def finish(self, which: Literal["last", "best"] = "last") -> None:
        """Write model.safetensors from the newest checkpoint, or from the best one."""
        newest, _ = checkpoints.find(self.checkpoints)
        found, _ = checkpoints.find(self.checkpoints, self._best_step(which))
        self.save_weights(found.load("model"), {"which": which, "step": str(newest.step)})

    def save_weights(self, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
        """Write model.safetensors durably. header: `which` ("last" or "best") and the `step` at
        which training ended; empty for weights that were not trained here."""
        with files.atomic_path(self.weights) as temporary:
            checkpoints.save_tensors(temporary, tensors, header)


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / ARCHITECTURE).is_file()


def _not_a_run(path: Path) -> OSError | ValueError:
    """What stands at `path` instead of a run, and the remedy."""
    if not path.exists():
        return FileNotFoundError(f"there is no run folder {path}: gptsmith pretrain makes one")
    if not path.is_dir():
        return ValueError(f"{path} is a file: give the run folder that holds it")
    if (path / "manifest.json").exists() and (path / "state.json").exists():
        return ValueError(
            f"{path} is a checkpoint: give its run folder {path.parent.parent} and --checkpoint"
        )
    if (path / "manifest.json").exists():
        return ValueError(
            f"{path} is a prepared corpus, not a run: gptsmith pretrain --data {path} trains on it"
        )
    if (path / "config.json").exists():
        return ValueError(f"{path} is a Hugging Face model: gptsmith import makes a run of it")
    if runs := sorted(child.name for child in path.iterdir() if _is_run(child)):
        return ValueError(f"{path} is no run, but holds some: {', '.join(runs[:10])}")
    missing = [name for name in (CONFIG, ARCHITECTURE) if not (path / name).is_file()]
    return ValueError(f"{path} is no run folder: it has no {' and no '.join(missing)}")


def _refuse_occupied(path: Path) -> None:
    """A new run may go into a new or empty folder, or one that was stopped before its first
    checkpoint."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder as --out")
    if not path.exists() or not any(path.iterdir()) or _is_untrained(path):
        return
    if _is_run(path):
        raise FileExistsError(f"{path} holds a run: --resume to go on with it, or another --out")
    raise FileExistsError(f"{path} is not empty and holds no run: choose another --out")


def _refuse_unresumable(path: Path) -> None:
    if not _is_run(path):
        raise ValueError(f"nothing to resume: {_not_a_run(path)}")
    if _is_untrained(path):
        raise ValueError(
            f"nothing to resume: {path} was stopped before its first checkpoint;"
            " leave --resume away to start it again"
        )
    if not checkpoints.steps(path / CHECKPOINTS):
        raise ValueError(f"nothing to resume: {path} has no checkpoints any more")


def _is_untrained(path: Path) -> bool:
    """Ours (it has the lock file), but without anything that would be lost."""
    trained = (path / WEIGHTS).exists() or bool(checkpoints.steps(path / CHECKPOINTS))
    events = monitor.read_events(path / monitor.METRICS)
    return (path / LOCK).exists() and not trained and not any(e["step"] for e in events)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is unreadable: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is unreadable: no mapping of names to values")
    return content


def _read_architecture(path: Path) -> ModelConfig:
    content = files.read_json(path)
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {field}: {first['msg']}") from None


def _header(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file, None if there is no file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; --checkpoint STEP opens another") from None
