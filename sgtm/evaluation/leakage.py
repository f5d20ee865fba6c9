"""Leakage: how much forget text the ablated model's knowledge is worth.

The token equivalent of a loss on forget data is the number of forget tokens that a standard model has to be trained on
to reach it; a curve through standard models of several numbers, 0 among them, gives it. Leakage is the token equivalent
divided by the forget tokens that the retain weights were trained on, those without their label and those labelled
`open:<domain>`, which is what could leak at worst in full: 0 where the ablated model is no better than one that has
seen none, about 1 where the masks had no consequence (arXiv 2512.05648, section 4).

Between 0 and the curve's first number the loss is a straight line in tokens, from there on in log tokens and log loss,
made to fall as in compute_ratio.py. Beyond the last number it continues as a power law, and is marked as extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sgtm.evaluation.compute_ratio import LearningCurve


class Leakage(NamedTuple):
    """tokens  token equivalent; low, high: of the loss one standard error up and down, None without an error
    ratio      to the undiscovered forget tokens, None where there were none
    extrapolated  beyond the most forget tokens of the curve
    """

    tokens: float
    low: float | None
    high: float | None
    ratio: float | None
    extrapolated: bool


class TokenCurve:
    """Losses on forget data of standard models by the number of forget tokens they were trained on.

    Raises ValueError without a model of 0 forget tokens, or with less than three others of a lower loss.
    """

    def __init__(self, tokens: Sequence[float], losses: Sequence[float]):
        unseen = [loss for count, loss in zip(tokens, losses, strict=True) if count == 0]
        if len(unseen) != 1:
            what = "exactly one model that was trained on 0 forget tokens"
            raise ValueError(f"the curve needs {what}; it has {len(unseen)}")
        self.unseen = unseen[0]
        # Without those that are no better than the unseen one, by which the curve would jump from 0 tokens to theirs.
        pairs = [(count, loss) for count, loss in zip(tokens, losses, strict=True) if count and loss < self.unseen]
        self.curve = LearningCurve([count for count, _ in pairs], [loss for _, loss in pairs])

    def equivalent(self, loss: float) -> tuple[float, bool]:
        """Forget tokens that this loss is worth, and whether they are extrapolated."""
        first, start = float(self.curve.falling[0]), float(self.curve.compute[0])
        if loss >= self.unseen:
            return 0.0, False
        if loss >= first:
            return start * (self.unseen - loss) / (self.unseen - first), False
        return self.curve.reached(loss)


def leakage(loss: float, curve: TokenCurve, undiscovered: float, error: float | None = None) -> Leakage:
    """Return the leakage of the ablated model's loss on forget data, in nats.

    undiscovered  forget tokens that the retain weights were trained on

    Raises ValueError for a loss that is not finite.
    """
    if not math.isfinite(loss):
        raise ValueError(f"the ablated model's loss on forget data is {loss}")
    tokens, extrapolated = curve.equivalent(loss)
    low, high = (None, None) if error is None else (curve.equivalent(loss + d)[0] for d in (error, -error))
    return Leakage(tokens, low, high, tokens / undiscovered if undiscovered else None, extrapolated)
