"""Expected loss as a function of model size and training tokens, fitted to finished runs.

    loss = E + A / N^a + B / D^b        (Hoffmann et al. 2022, equation 2)

in nats per token of the validation split, N parameters that a token is multiplied by (blocks and
head), D training tokens. E, A and B are specific to a corpus and its tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from gptsmith import files


class Point(NamedTuple):
    """A finished run: parameters, tokens, validation loss."""

    N: float
    D: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """error: relative, of the losses of runs that were not in the fit. N, D: ranges of the runs,
    those included. bytes_per_token: of the corpus."""

    E: float
    A: float
    a: float
    B: float
    b: float
    error: float = float("nan")
    N: tuple[float, float] = (0.0, float("inf"))
    D: tuple[float, float] = (0.0, float("inf"))
    bytes_per_token: float = 1.0

    def loss(self, N: float, D: float) -> float:
        return self.E + self.A / N**self.a + self.B / D**self.b

    def covers(self, N: float, D: float) -> bool:
        """Whether a run is within the sizes and tokens of those that were fitted or held out, give
        or take a tenth: beyond, nothing was verified."""
        ranges = (N, self.N), (D, self.D)
        return all(low / 1.1 <= x <= 1.1 * high for x, (low, high) in ranges)


EXPONENTS = np.geomspace(0.05, 1.5, 60)


def fit(
    points: Sequence[Point], exponents: Iterable[tuple[float, float]] | None = None
) -> ScalingLaw:
    """The law with the least squares of relative errors.

    For given exponents the loss is linear in E, A and B, which may not be negative; the exponents
    are tried one pair after the other. exponents: pairs (a, b) to try, by default a grid. Raises
    ValueError for fewer than three points.
    """
    if len(points) < 3:
        raise ValueError(f"{len(points)} runs: a scaling law needs at least 3")
    N, D, loss = np.array(points, dtype=np.float64).T
    pairs = exponents or ((a, b) for a in EXPONENTS for b in EXPONENTS)
    best: tuple[float, tuple[float, ...]] = (np.inf, ())
    for a, b in pairs:
        # scaled to about 1 each, so that they are solved equally exactly
        terms = np.stack([np.ones_like(N), (N / N.min()) ** -a, (D / D.min()) ** -b], axis=1)
        factors = _nonnegative(terms / loss[:, None])
        residual = float(np.sum((terms @ factors / loss - 1) ** 2))
        if residual < best[0]:
            E, A, B = factors * (1, N.min() ** a, D.min() ** b)
            best = residual, (E, A, a, B, b)
    E, A, a, B, b = map(float, best[1])
    sizes, tokens = ((float(x.min()), float(x.max())) for x in (N, D))
    return ScalingLaw(E, A, a, B, b, N=sizes, D=tokens)


def _nonnegative(terms: np.ndarray) -> np.ndarray:
    """The factors >= 0 with which the columns of terms (n, 3) come closest to 1."""
    used = list(range(terms.shape[1]))
    while True:
        found = np.zeros(terms.shape[1])
        found[used] = np.linalg.lstsq(terms[:, used], np.ones(len(terms)), rcond=None)[0]
        if found.min() >= 0:
            return found
        used.remove(int(found.argmin()))


FITTED = Path(__file__).with_name("scaling_laws.json")
"""Written by `python -m benchmarks scaling`: fingerprint of a corpus -> its law."""


LAWS = TypeAdapter(dict[str, ScalingLaw]).validate_python(files.read_json(FITTED))
