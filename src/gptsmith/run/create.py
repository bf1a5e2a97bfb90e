"""Create a run folder, or open an existing one to resume training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith import files
from gptsmith.config import diff, flatten
from gptsmith.model import state_dict as model_weights
from gptsmith.model.config import ModelConfig
from gptsmith.model.tuning import Tuning
from gptsmith.run import Run, digests, layout
from gptsmith.run import resume as checks
from gptsmith.run.layout import MASK
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import distributed

_DATA = "fingerprint of the training data"  # compared on resume


def open_for_training(
    path: str | Path,
    config: dict[str, Any],
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    resume: bool = False,
    *,
    corpus: str | None = None,
    fixed: Sequence[str] = (),
    last_step: int | None = None,
    template: str | None = None,
    tuning: Tuning | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> Run:
    """Create a run for training, or resume one; locked until `close` or the process ends.

    config: plain values (str, int, float, bool, None, list, dict). model_config: a mask
    `file.py:function` is copied into the folder as mask.py; `run.model_config.mask` then names
    the copy. corpus: fingerprint of the training data. tuning: which part of the weights is
    trained (default: all of them). base: the weights before training, if a part is trained.
    last_step: at which the run ends, if it is known; a checkpoint to resume may not be beyond it.
    resume: there must be a checkpoint, and architecture, tokenizer, template, corpus, tuning
    and the `fixed` fields of config (`train.seed`) must not differ, else ValueError with the
    differences.

    With several ranks, rank 0 does this, and the others learn from it which checkpoint is intact.

    Raises ValueError if another process trains here, and FileExistsError for a folder that is not
    empty unless it is resumed (a run stopped before its first checkpoint counts as empty).
    """
    path, tuning = Path(path), tuning or Tuning()
    model_config, extra = _with_own_mask(model_config, path, resume)
    if layout.MASK_CODE.fullmatch(model_config.mask) and "model" in config:
        config = {**config, "model": model_config.model_dump(mode="json")}
    check = checks.check_resumable if resume else checks.check_unoccupied
    run = Run(path)

    def lock_and_write() -> list[Any] | None:
        """Returns step and path of the checkpoint to resume from, and the damage of newer ones."""
        check(path)
        files.make_folder(path)
        run.lock()
        check(path)  # again, now that the folder is locked
        if resume:
            flat = flatten(config)
            new = {
                **{name: flat.get(name) for name in fixed},
                "model": model_config.model_dump(),
                "tokenizer": tokenizer.fingerprint[:12],
                layout.TEMPLATE: template,
                "tuning": tuning.model_dump(),
                _DATA: str(corpus),
                **{name: sha256(data).hexdigest()[:12] for name, data in extra.items()},
            }
            _check_unchanged(run, new, fixed)
            run.changes = checks.changed_settings(run.config, config)
            run.notice = digests.unverified_note(path)
        files.remove_temporary_files(path)
        checkpoints.clean(run.checkpoints)
        if resume:
            run.resumed = checkpoints.find(run.checkpoints)  # before anything is written
            _check_not_beyond(last_step, run.resumed[0].step, path)
            if (path / layout.BASE).exists():
                digests.record_existing(path, layout.BASE)
        else:  # remains of a run that was stopped before its first checkpoint
            names = (
                layout.TUNING, layout.BASE, layout.TEMPLATE, layout.ROLES, layout.REFERENCE, MASK,
            )  # fmt: skip
            digests.remove(path, names)
            if not tuning.is_full_finetune:
                assert base is not None
                run.write_weights(layout.BASE, base)
                extra[layout.TUNING] = files.json_bytes(tuning.model_dump(mode="json"))
        extra[layout.CORPUS] = files.json_bytes({"fingerprint": corpus})
        digests.write(path, extra | _contents(stored, model_config, tokenizer, template))
        if run.resumed is None:
            return None
        newest, damage = run.resumed
        return [newest.step, str(newest.path), damage]

    # so that config.yaml can start another run
    stored = {**config, "resume": False} if "resume" in config else config
    try:
        found = distributed.from_rank_0(lock_and_write)
    except BaseException:
        run.close()
        raise
    if found is not None and run.resumed is None:  # other ranks than 0
        step, newest_path, damage = found
        run.resumed = checkpoints.Checkpoint(Path(newest_path), step), damage
    run.__dict__.update(config=stored, model_config=model_config, tokenizer=tokenizer)
    run.__dict__.update(template=template, tuning=tuning)
    return run


def create_from_weights(
    path: str | Path,
    config: dict[str, Any],
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    template: str | None = None,
) -> Run:
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
    return Run.open(path)


def _with_own_mask(
    model_config: ModelConfig, path: Path, resume: bool
) -> tuple[ModelConfig, dict[str, bytes]]:
    """A mask `file.py:function` as the run's own mask.py, and the contents of that file to write.

    FileNotFoundError if the file does not exist, unless a run to resume has its copy.
    """
    code = layout.MASK_CODE.fullmatch(model_config.mask.strip())
    if code is None:
        return model_config, {}
    source = Path(code[1])
    own = model_config.change(mask=f"{MASK}:{code[2]}")
    # on resume, a mask.py without a folder is the run's own copy
    if source.is_file() and not (resume and source == Path(MASK)):
        return own, {MASK: source.read_bytes()}
    if resume and (path / MASK).is_file():
        return own, {}
    raise FileNotFoundError(f"mask {str(source)!r}: there is no such file")


def _check_unchanged(run: Run, new: Mapping[str, Any], fixed: Sequence[str]) -> None:
    recorded, config = run.verified(layout.CORPUS), flatten(run.config)
    old: dict[str, Any] = {
        **{name: config.get(name) for name in fixed},
        "model": run.model_config.model_dump(),
        "tokenizer": run.tokenizer.fingerprint[:12],
        layout.TEMPLATE: run.template,
        "tuning": run.tuning.model_dump(),
        _DATA: str(files.read_mapping(recorded).get("fingerprint"))
        if recorded.exists()
        else new[_DATA],
    }
    if MASK in new:
        copy = run.path / MASK
        old[MASK] = files.sha256(copy)[:12] if copy.is_file() else None
    if changes := diff(old, new):
        raise ValueError(
            f"{run.path} cannot be resumed with other settings: {'; '.join(changes)};"
            " use the old values, or another --out"
        )


def _check_not_beyond(last_step: int | None, step: int, path: Path) -> None:
    """Steps cannot be taken back, and config.yaml would name an end that the run never had."""
    if last_step is not None and step > last_step:
        raise ValueError(
            f"{path} is at step {step:,}, and would now end at step {last_step:,}: "
            f"--train.steps {step} ends it where it is, a larger number trains it further"
        )


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
