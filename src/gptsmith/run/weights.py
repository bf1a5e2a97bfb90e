"""Loading the weights of a run, and writing the final ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptsmith.interop import peft
from gptsmith.interop.peft import Adapter
from gptsmith.model import lora, tuning
from gptsmith.model import state_dict as model_weights
from gptsmith.model.gpt import GPTModel
from gptsmith.run import digests, layout
from gptsmith.run.layout import Which
from gptsmith.train import checkpoint as checkpoints
from gptsmith.train import runtime

if TYPE_CHECKING:
    from gptsmith.run.folder import Run


def load_model(
    run: Run, checkpoint: Which, device: str | torch.device, trust_code: bool
) -> GPTModel:
    """See Run.load_model."""
    tensors, source = _tensors(run, checkpoint)
    complete = run.tuning.is_full_finetune or source == run.path / layout.WEIGHTS
    model = _model(run, tensors, source, complete, trust_code)
    return model.to(runtime.choose_device(str(device))).eval()


def base_model(run: Run, trust_code: bool) -> GPTModel:
    """See Run.base_model."""
    digests.check(run.path, layout.BASE)
    source = run.path / layout.BASE
    return _model(run, checkpoints.load_tensors(source), source, True, trust_code)


def load_adapter(run: Run, checkpoint: Which) -> Adapter:
    """See Run.load_adapter."""
    tensors, _ = _tensors(run, checkpoint)
    return Adapter(run.tuning.lora, tensors, run.tuning.token_ids)


def finish(run: Run, which: Literal["last", "best"]) -> None:
    """See Run.finish."""
    newest, damage = checkpoints.find(run.checkpoints)
    if damage:
        raise ValueError(f"{'; '.join(damage)}; --resume trains again from step {newest.step}")
    chosen, _ = checkpoints.find(run.checkpoints, _best_step(run, which))
    tensors, header = chosen.load("model"), {"which": which, "step": str(newest.step)}
    if run.tuning.lora.rank:
        run.weights.parent.mkdir(exist_ok=True)
        adapter = Adapter(run.tuning.lora, tensors, run.tuning.token_ids)
        peft.save(
            run.weights.parent, run.model_config, adapter, header,
            atomic=lambda path: digests.recorded(run.path, f"{layout.ADAPTER}/{path.name}"),
        )  # fmt: skip
        return
    if not run.tuning.is_full_finetune:
        tensors = _model(run, tensors, chosen.path, False, trust_code=True).state_dict()
    save(run.weights, tensors, header)


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a weights file of a run durably, after recording its digest.

    header: `which` ("last" or "best") and the `step` at which training ended; empty for weights
    that were not trained here.
    """
    with digests.recorded(path.parent, path.name) as temporary:
        checkpoints.save_tensors(temporary, tensors, header)


def _model(
    run: Run, tensors: dict[str, Tensor], source: Path, complete: bool, trust_code: bool
) -> GPTModel:
    """The model with these weights: `complete`, or the trained ones on top of the base's."""
    if complete:
        return model_weights.load(
            run.model_config, tensors, source, mask_folder=run.path, trust_code=trust_code
        )
    model = base_model(run, trust_code)
    run.tuning.wrap(model)
    tuning.load_trainable_state_dict(model, tensors, source)
    lora.merge(model)
    return model


def _tensors(run: Run, which: Which) -> tuple[dict[str, Tensor], Path]:
    """The requested weights (all, or the trained ones) and the file or folder they come from."""
    for _ in range(10):
        try:
            return _read(run, which)
        except FileNotFoundError:  # pruned by the process that trains here: look again
            continue
    return _read(run, which)


def _read(run: Run, which: Which) -> tuple[dict[str, Tensor], Path]:
    run.notice = digests.note(run.path)
    header = None if isinstance(which, int) else _header(run)
    steps = checkpoints.steps(run.checkpoints)
    if header is not None and which in ("last", header.get("which")):
        # Training may have continued since. Imported weights have no step: they are final.
        last_step = int(header.get("step", sys.maxsize))
        if not any(step > last_step for step in steps):
            return _final_tensors(run), run.weights
    if not steps:
        raise ValueError(
            f"{run.path} has no checkpoints, only its final {run.weights.name}"
            if run.weights.exists()
            else f"{run.path} has no weights yet, it was stopped before its first checkpoint:"
            " start it again"
        )
    chosen, damage = checkpoints.find(run.checkpoints, _best_step(run, which))
    if which == "last":
        damage.append(f"{run.path} is unfinished: this is its step {chosen.step}")
    run.notice = "; ".join([*filter(None, [run.notice]), *damage])
    return chosen.load("model"), chosen.path


def _final_tensors(run: Run) -> dict[str, Tensor]:
    if not run.tuning.lora.rank:
        return checkpoints.load_tensors(run.weights)
    try:
        return dict(peft.load(run.weights.parent, run.model_config).tensors)
    except ValueError as error:
        raise ValueError(f"{run.path}: {error}") from None


def _best_step(run: Run, which: Which) -> Literal["last"] | int:
    """`which`, with "best" replaced by the best step, which the newest intact checkpoint names."""
    if which != "best":
        return which
    state = checkpoints.find(run.checkpoints)[0].state
    if state.get("best_loss") is None:
        raise ValueError(f"{run.path} has no best checkpoint: nothing was evaluated yet")
    return int(state["best_step"])


def verify(run: Run) -> None:
    """See Run.verify_weights."""
    remedy = "restore it from a copy, or open a checkpoint with --checkpoint STEP"
    names = [layout.WEIGHTS]
    if run.tuning.lora.rank:
        names = [layout.BASE, *(f"{layout.ADAPTER}/{n}" for n in (peft.CONFIG, peft.WEIGHTS))]
    for name in names:
        if (run.path / name).exists():
            digests.check(run.path, name, remedy)


def _header(run: Run) -> dict[str, str] | None:
    """The metadata of the final weights, whose digests are compared; None if there are none."""
    path = run.weights
    if not path.exists():
        return None
    verify(run)
    with path.open("rb"):  # an unreadable file is not a damaged one
        pass
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; --checkpoint STEP opens another") from None
