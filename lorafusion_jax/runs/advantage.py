"""Prediction of a pool's advantage from the descent of its modules, by a linear model of few tasks.

The advantage is the test loss of a fusion of rotated copies of the modules minus that of the modules themselves, in
nats per answer token. The tasks that the package's model was fitted on are in `advantage.json`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from ..support.reading import read_json

Feature = Literal["log_ratio", "loss", "log_rows"]
FEATURES: tuple[Feature, ...] = ("log_ratio", "loss", "log_rows")
# Least advantage that is worth a pool, in nats per answer token: the bound in `experiments/pool_value.md`.
WORTH = 0.05
LEVEL = 0.8  # of the interval
FEWEST = 3  # tasks of a calibration


class Case(TypedDict):
    """A task whose advantage was measured: logarithm of the descent's ratio, loss of the base, training rows."""

    task: str
    log_ratio: float
    loss: float
    rows: int
    advantage: float


class Fitted(TypedDict):
    """Contents of `advantage.json`: digest of the base, and its tasks."""

    base: str
    base_sha256: str
    script: str
    cases: list[Case]


class Prediction(NamedTuple):
    """Advantage in nats per answer token, with the ends of its interval for one task."""

    advantage: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["worth it", "not worth it", "cannot tell"]:
        if self.low > WORTH:
            return "worth it"
        return "not worth it" if self.high < WORTH else "cannot tell"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Linear model of the advantage.

    Attributes:
      features: names of the features.
      centre: [features], their means.
      slopes: [features], advantage for each unit of a feature.
      intercept: mean advantage.
      inverse: [features, features], inverse of the centred features' sums of squares and products.
      spread: standard deviation of the residuals.
      tasks: number of tasks.
      freedom: degrees of freedom.
      rows: fewest and most training rows of the tasks.
    """

    features: tuple[Feature, ...]
    centre: Float[np.ndarray, " features"]
    slopes: Float[np.ndarray, " features"]
    intercept: float
    inverse: Float[np.ndarray, "features features"]
    spread: float
    tasks: int
    freedom: int
    rows: tuple[int, int]

    def predict(self, log_ratio: float, loss: float, rows: int) -> Prediction:
        """Return the advantage on a task, with the t interval for one new task."""
        away = _row(self.features, log_ratio, loss, rows) - self.centre
        value = self.intercept + float(away @ self.slopes)
        error = self.spread * np.sqrt(1 + 1 / self.tasks + away @ self.inverse @ away)
        half = float(stdtrit(self.freedom, (1 + LEVEL) / 2) * error)
        return Prediction(value, value - half, value + half)

    def calibrated(self, cases: Sequence[Case]) -> "Model":
        """Return the model with the mean and the spread of other tasks, whose slopes it keeps."""
        left = [case["advantage"] - self.predict(*_of(case)).advantage for case in cases]
        return dataclasses.replace(
            self,
            intercept=self.intercept + float(np.mean(left)),
            inverse=np.zeros_like(self.inverse),
            spread=float(np.std(left, ddof=1)),
            tasks=len(cases),
            freedom=len(cases) - 1,
            rows=_rows(cases),
        )


def fit(cases: Sequence[Case], features: Sequence[Feature] = FEATURES) -> Model:
    """Return the model with the least squares of some tasks; features that are equal for all of them are left out."""
    numbers = np.stack([_row(features, *_of(case)) for case in cases])
    used = [place for place in range(len(features)) if np.ptp(numbers[:, place]) > 0]
    freedom = len(cases) - len(used) - 1
    if freedom < 1:
        raise ValueError(f"{len(cases)} tasks for {len(used)} slopes: give at least {len(used) + 2}")
    numbers, wanted = numbers[:, used], np.array([case["advantage"] for case in cases])
    centre, mean = numbers.mean(axis=0), wanted.mean()
    away = numbers - centre
    inverse = np.linalg.inv(away.T @ away)
    slopes = inverse @ away.T @ (wanted - mean)
    left = wanted - mean - away @ slopes
    return Model(
        features=tuple(features[place] for place in used),
        centre=centre,
        slopes=slopes,
        intercept=float(mean),
        inverse=inverse,
        spread=float(np.sqrt(left @ left / freedom)),
        tasks=len(cases),
        freedom=freedom,
        rows=_rows(cases),
    )


@functools.cache
def packaged() -> Fitted:
    """Return the tasks that the package's model is fitted on."""
    return read_json(Path(__file__).with_name("advantage.json"), Fitted, "the tasks of the forecast")


def _row(features: Sequence[Feature], log_ratio: float, loss: float, rows: int) -> Float[np.ndarray, " features"]:
    numbers = {"log_ratio": log_ratio, "loss": loss, "log_rows": float(np.log(rows))}
    return np.array([numbers[name] for name in features])


def _of(case: Case) -> tuple[float, float, int]:
    return case["log_ratio"], case["loss"], case["rows"]


def _rows(cases: Sequence[Case]) -> tuple[int, int]:
    rows = [case["rows"] for case in cases]
    return min(rows), max(rows)
