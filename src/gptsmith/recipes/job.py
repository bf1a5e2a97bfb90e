"""What a recipe passes to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import in_loop_eval
from gptsmith.recipes.plan import Dataset
from gptsmith.recipes.prefetch import Batches
from gptsmith.train.monitor import LOSS_LABEL
from gptsmith.train.step import Loss


@dataclass(frozen=True)
class TrainingJob:
    """What a recipe passes to the loop.

    model          on its device, adapters attached and parameters frozen as configured; if it is to
                   be sharded (`Plan.is_sharded`), on the CPU, and if it has init_parameter, empty
    evaluate       maximum number of validation tokens (None: all) -> scores, one of them
                   `val_OBJECTIVE`
    val_tokens     size of the validation split
    samples        texts that the model generates: (prompt, text)
    evaluate_tasks scores of eval.tasks
    verify_data    ValueError if a file of the training data is damaged
    curves         measurements to draw in curves.png: metrics of the loss, which evaluate returns
                   as val_NAME
    loss_label     of the axis of the loss there, with its unit
    init_parameter draws the first weights of the parameter with a name (train/sharding.init)
    objective      what evaluations are compared by, and curves.png draws first: `loss`, which is
                   to be low, or a measurement that is to be high
    remedy         what to do if no evaluation was better than the one before training; asked for at
                   the end
    batches        step -> this rank's micro-batches, where they depend on the weights of that
                   moment; default those of the dataset
    metrics        further measurements of the newest step, by name
    state          step -> tensors that the run needs, besides weights and optimizer, to go on after
                   this step; all ranks ask for them
    load_state     takes the step, and what `state` returned for it
    """

    model: GPTModel
    loss: Loss
    dataset: Dataset
    evaluate: Callable[[int | None], Mapping[str, float | int | None]]
    val_tokens: int
    samples: Callable[[], Iterator[tuple[str, str]]] = lambda: iter(())
    evaluate_tasks: in_loop_eval.TaskEvaluation | None = None
    verify_data: Callable[[], None] = lambda: None
    curves: tuple[str, ...] = ()
    loss_label: str = LOSS_LABEL
    init_parameter: Callable[[str, Tensor], None] | None = None
    objective: str = "loss"
    remedy: Callable[[], str] = lambda: "check the learning rate and the data"
    batches: Batches | None = None
    metrics: Callable[[], Mapping[str, float]] = dict
    state: Callable[[int], Mapping[str, Tensor]] = lambda step: {}
    load_state: Callable[[int, Mapping[str, Tensor]], None] = lambda step, state: None
