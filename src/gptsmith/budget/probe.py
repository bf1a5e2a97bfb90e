"""The scaling law of any corpus, from two short runs on it and the laws of others.

Between corpora, losses per byte differ by a factor that hardly depends on size and tokens
(docs/log.md), so the runs have to tell only this factor.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gptsmith import terminal
from gptsmith.budget import estimate, rules
from gptsmith.budget.machine import Machine
from gptsmith.budget.rules import Design
from gptsmith.budget.scaling_law import LAWS, Point, ScalingLaw
from gptsmith.data.shards import Corpus
from gptsmith.model.flops import matmul_parameters
from gptsmith.recipes.options import (
    EvalConfig,
    MonitorConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
)
from gptsmith.recipes.pretrain import pretrain
from gptsmith.train.monitor import METRICS, read_events

ERROR = 0.05  # of the laws of corpora on which no sweep was run
_RUNS = ((1, 0.25), (2, 0.75))  # depth, share of the time
_STEPS = 20  # at least, of each


def probe(corpus: Corpus, seconds: float, machine: Machine) -> ScalingLaw:
    """Train on the corpus for about so long. ValueError if that, or the corpus, is too short.

    machine: this one, with the speed of steps that are not compiled.
    """
    needed = -(-_STEPS * rules.MIN_BATCH_TOKENS // rules.MAX_EPOCHS)
    if corpus.train_tokens < needed:
        raise ValueError(
            f"{corpus.path}: {corpus.train_tokens:,} training tokens are too few for --probe, "
            f"which needs {needed:,}: omit it, or prepare more text"
        )
    points = []
    # they start in this process, so only their steps and evaluations take time
    steps_only = replace(machine, startup=0.0)
    for depth, share in _RUNS:
        design = estimate.longest(
            depth,
            estimate.Budget(
                seconds=share * seconds,
                corpus_tokens=corpus.train_tokens,
                vocab_size=corpus.tokenizer.vocab_size,
            ),
            steps_only,
        )
        if design is None or design.steps < _STEPS:
            raise ValueError(
                f"--probe {seconds:.0f}s is too short for {_STEPS} steps here: give more"
            )
        points.append(Point(matmul_parameters(design.model), design.tokens, _loss(design, corpus)))
    train = corpus.manifest["splits"]["train"]
    return scaled(points, train["bytes"] / train["tokens"])


def scaled(points: Sequence[Point], bytes_per_token: float) -> ScalingLaw:
    """The known law that is closest to the points, times a factor. Laws are compared per byte."""
    found = []
    for known in LAWS.values():
        ratio = known.bytes_per_token / bytes_per_token
        B, D = known.B * ratio**known.b, (known.D[0] * ratio, known.D[1] * ratio)
        law = replace(known, B=B, D=D, bytes_per_token=bytes_per_token)
        ratios = [math.log(p.loss / law.loss(p.N, p.D)) for p in points]
        factor = math.exp(sum(ratios) / len(ratios))
        spread = max(ratios) - min(ratios)
        law = replace(law, E=law.E * factor, A=law.A * factor, B=law.B * factor)
        found.append((spread, replace(law, error=max(ERROR, spread))))
    return min(found, key=lambda pair: pair[0])[1]


def _loss(design: Design, corpus: Corpus) -> float:
    """The validation loss after training, in a folder that is removed."""
    recipe = design.recipe()
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig(
            data=corpus.path,
            out=Path(folder) / "run",
            model=design.model,
            train=TrainConfig(**recipe["train"], compile="off"),
            optim=OptimConfig(**recipe["optim"]),
            eval=EvalConfig(interval=0, tokens=10_000, sample_tokens=0),
            monitor=MonitorConfig(trackers=("none",)),
        )
        with terminal.silenced():
            code = pretrain(config)
        if code:
            raise KeyboardInterrupt
        events = read_events(config.out / METRICS)
    return float([event["val_loss"] for event in events if event["event"] == "val"][-1])
