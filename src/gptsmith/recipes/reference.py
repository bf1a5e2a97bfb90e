"""Log-probabilities of answers under the reference, which is the model before preference tuning.

They are computed once, before the first step, and kept in the run folder, from which a resumed run
reads them: no second model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gptsmith.data.pair_rows import PairRows
from gptsmith.model.gpt import GPTModel
from gptsmith.progress import WorkProgress
from gptsmith.run import Run, digests
from gptsmith.run.layout import REFERENCE
from gptsmith.train import checkpoint, distributed
from gptsmith.train.preference import answer_log_probs
from gptsmith.train.runtime import Precision


@contextmanager
def evaluating(model: GPTModel, precision: Precision) -> Iterator[None]:
    """Inside, the model computes without dropout and gradients, in the precision of training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), precision.autocast():
            yield
    finally:
        model.train(training)


def reference_log_probs(
    run: Run, resumed: bool, model: GPTModel, parts: Mapping[str, PairRows], B: int,
    precision: Precision,
) -> dict[str, Tensor]:  # fmt: skip
    """For each part, the log-probabilities of its chosen and rejected answers, (pairs, 2) fp32.

    model: before its first step. B: pairs of a batch. A resumed run's are read from its folder:
    ValueError if they are damaged.
    """
    if resumed:
        found = checkpoint.load_tensors(run.verified(REFERENCE))
    else:
        found = _computed(model, parts, B, precision)
        if distributed.rank() == 0:
            with digests.recorded(run.path, REFERENCE) as temporary:
                checkpoint.save_tensors(temporary, found)
        distributed.barrier()
    for name, rows in parts.items():
        assert found[name].shape == (len(rows.pairs), 2)
    return found


def _computed(
    model: GPTModel, parts: Mapping[str, PairRows], B: int, precision: Precision
) -> dict[str, Tensor]:
    """Ranks take turns with the batches."""
    device = model.head_weight.device
    total, done = sum(len(rows.pairs) for rows in parts.values()), 0
    found = {}
    with (
        evaluating(model, precision),
        WorkProgress(
            "reference log-probabilities (pairs)", total, quiet=distributed.rank() > 0
        ) as progress,
    ):
        for name, rows in parts.items():
            values = torch.zeros(len(rows.pairs), 2)
            for turn, numbers in enumerate(rows.groups(B)):
                if turn % distributed.world_size() == distributed.rank():
                    log_p = answer_log_probs(model, rows.of(numbers).to(device))
                    values[torch.tensor(numbers)] = log_p.view(2, -1).T.cpu()
                done += len(numbers)
                progress.update(done)
            found[name] = distributed.sum_over_ranks(values)
    return found
