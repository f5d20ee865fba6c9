"""Compute ratio: the share of a baseline's training compute at which the baseline reaches a loss.

0.9 means: what was gained is worth nine tenths of the baseline's training. It makes losses of different categories and
corpora comparable, which nats are not. The baseline's curve is that of its evaluations, as they are: isotonic
regression (pool adjacent violators) makes it fall, and between two evaluations it is a straight line in log compute and
log loss. No law is fitted inside the measured range: a cosine's end does not follow a power law. The best one missed
the last evaluation of a run by 0.06 nats (novels, a million parameters, 400 steps), more than recipes differ by. A
baseline compared with itself is at 1.

Outside that range the curve continues as the power law E + A * compute ** -alpha that fits the evaluations best, moved
to meet its end, and the value is marked as extrapolated.

The error is that of one evaluation: each is predicted from its two neighbours, and the root mean square of what is
missed, near the loss in question, is the standard deviation of an evaluation (noise, and curvature that the straight
line does not follow). `low` and `high` are the ratios of the loss one such deviation up and down. Neither other seeds
nor the power law's own error are in them: compare several seeds.

What the curve of a single run means: in the middle of a run the learning rate is still high, and at its end the curve
is flat. A shorter schedule would reach the same loss with less, so the ratio of a loss just above the baseline's last
is too low: 0.90 for 0.005 nats in the run above. Baselines that were trained to the end at several lengths give a
better curve: the last evaluation of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

LEAST = 3  # evaluations of a curve
NEAR = 7  # evaluations whose error is that of a loss between them
FITTED = 64  # evaluations that the power law is fitted to


@dataclass(frozen=True)
class ComputeRatio:
    """value, low, high  shares of the baseline's compute, infinite where it would never reach the loss; low and high
                         are NaN where the curve has too few evaluations for an error
    extrapolated         whether the loss is outside what the baseline has measured
    """

    value: float
    low: float
    high: float
    extrapolated: bool

    def __str__(self) -> str:
        """'0.93 (0.91 to 0.95)'; with an asterisk where extrapolated."""
        bounds = "" if math.isnan(self.low) else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.2f}{'*' * self.extrapolated}{bounds}"


class PowerLaw(NamedTuple):
    """loss = floor + factor * compute ** -exponent"""

    floor: float
    factor: float
    exponent: float

    def compute(self, loss: float) -> float:
        """Infinite at the floor and below."""
        return ((loss - self.floor) / self.factor) ** (-1 / self.exponent) if loss > self.floor else math.inf


class LearningCurve:
    """Evaluations of a baseline: compute (tokens, FLOPs, steps; above 0) and loss (nats, above 0), in any order.

    Raises ValueError for fewer than three evaluations, one that is not finite, or a loss that does not fall.
    """

    def __init__(self, compute: Sequence[float], losses: Sequence[float]):
        order = np.argsort(np.asarray(compute, dtype=float), kind="stable")
        self.compute, self.losses = (np.asarray(values, dtype=float)[order] for values in (compute, losses))
        if len(order) < LEAST:
            raise ValueError(f"a learning curve needs {LEAST} evaluations or more, the baseline has {len(order)}")
        if not (np.isfinite(self.losses) & (self.losses > 0) & (self.compute > 0)).all():
            raise ValueError(
                f"the baseline's losses and compute must be finite and above 0; they are {self.losses.tolist()} at "
                f"{self.compute.tolist()}"
            )
        if (np.diff(self.compute) == 0).any():
            raise ValueError("two evaluations of the baseline are at the same compute")
        self.falling = _falling(self.losses)
        if self.falling[0] == self.falling[-1]:
            raise ValueError("the baseline's loss does not fall, so that it reaches no loss at a compute of its own")

    def ratio(self, loss: float) -> ComputeRatio:
        """Return the ratio of a loss in nats, finite and above 0."""
        value, outside = self.reached(loss)
        error = self.error(loss)
        low = high = math.nan
        if not math.isnan(error):
            low, high = self.reached(loss + error)[0], self.reached(max(loss - error, 1e-9))[0]
        whole = float(self.compute[-1])
        return ComputeRatio(value / whole, low / whole, high / whole, outside)

    def error(self, loss: float) -> float:
        """Standard deviation of an evaluation near this loss, in nats; NaN where only three were made."""
        if len(self.losses) <= LEAST:
            return math.nan
        x, y = np.log(self.compute), np.log(self.losses)
        share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
        missed = self.losses[1:-1] - np.exp(y[:-2] * (1 - share) + y[2:] * share)
        variance = missed**2 / (1 + share**2 + (1 - share) ** 2)
        near = np.argsort(np.abs(self.falling[1:-1] - loss), kind="stable")[:NEAR]
        return float(np.sqrt(variance[near].mean()))

    @cached_property
    def law(self) -> PowerLaw | None:
        """The power law that fits best: for each floor the median of all slopes (Theil, 1950; Sen, 1968), and of the
        floors the one with the least mean absolute error. None where no slope falls."""
        chosen = np.unique(np.linspace(0, len(self.losses) - 1, FITTED).astype(int))
        x, losses = np.log(self.compute[chosen]), self.losses[chosen]
        lowest = float(losses.min())
        best, best_error, low, high = None, math.inf, 0.0, lowest
        for _ in range(4):  # each time between the neighbours of the best floor
            floors = np.linspace(low, high, 41)[:-1].tolist()
            for law in filter(None, (_law(x, losses, floor) for floor in floors)):
                error = float(np.abs(law.floor + law.factor * np.exp(-law.exponent * x) - losses).mean())
                if error < best_error:
                    best, best_error = law, error
            if best is None:
                return None
            step = floors[1] - floors[0]
            low, high = max(0.0, best.floor - step), min(lowest, best.floor + step)
        return best

    def reached(self, loss: float) -> tuple[float, bool]:
        """The compute at which the curve first is at this loss, infinite where it never is, and whether that is
        extrapolated."""
        if loss > self.falling[0]:
            return self._beyond(loss, 0), True
        if loss < self.falling[-1]:
            return self._beyond(loss, -1), True
        i = int(np.argmax(self.falling <= loss))
        if i == 0:
            return float(self.compute[0]), False
        above, below = np.log(self.falling[i - 1 : i + 1])
        share = (above - math.log(loss)) / (above - below)
        return float(self.compute[i - 1] ** (1 - share) * self.compute[i] ** share), False

    def _beyond(self, loss: float, end: int) -> float:
        """By the law, moved along the axis of compute so that it meets the curve at this end."""
        if self.law is None:
            return float(self.compute[0]) if end == 0 else math.inf
        moved = float(self.compute[end]) / self.law.compute(float(self.falling[end]))
        return moved * self.law.compute(loss)


def _falling(losses: np.ndarray) -> np.ndarray:
    """The non-increasing sequence nearest to the losses in squares: pool adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for loss in losses.tolist():
        mean, count = loss, 1
        while blocks and blocks[-1][0] < mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in blocks])


def _law(x: np.ndarray, losses: np.ndarray, floor: float) -> PowerLaw | None:
    if floor >= losses.min():
        return None
    y = np.log(losses - floor)
    i, j = np.triu_indices(len(x), 1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
    return PowerLaw(floor, math.exp(float(np.median(y - slope * x))), -slope) if slope < 0 else None
