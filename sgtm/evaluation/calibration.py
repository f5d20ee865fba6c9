"""Calibrated losses: what is left of an ablation once the ablated model's output frequencies are put right.

An ablated model may merely avoid the words of a domain, and its loss looks as if it had forgotten. So a vector of
biases is added to its logits and fitted, on text of the training split, to

    loss on forget data + 100 * loss on retain data

(arXiv 2512.05648; there by 200 or 500 steps of an optimizer). The problem is convex: here it is solved to its optimum
by L-BFGS, so that the result depends on no step size and no seed. A weak Gaussian prior (deviation 3 nats, weighed as
a forget target is) keeps the biases of tokens that the sample lacks where they are. Losses are those of another split.

Biases fitted to too little text hold what is peculiar to that text, and raise the losses of any other: by about half a
nat times vocabulary / targets. So the sample grows with the vocabulary (`TARGETS_PER_TOKEN`).

The optimum weighs retain data a hundredfold. Where an ablation has damaged the retained losses too, the biases repair
these first, and the calibrated forget loss can be above the loss itself: an attacker has the lower of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm.data.batch import IGNORE
from sgtm.evaluation.estimates import Estimate, token_mean
from sgtm.evaluation.subject import Hidden, Subject

RETAIN_WEIGHT = 100.0
PRIOR = 3.0  # nats
ITERATIONS = 200  # of L-BFGS, at most; 40 to 60 are enough
TOLERANCE = 1e-5  # of the gradient, by which the objective's weights are divided by their sum
TARGETS_PER_TOKEN = 20  # of the vocabulary, in the sample: forget and retain data each


class FitSample(NamedTuple):
    """Targets of a category, with the hidden states that they are predicted from.

    targets, documents  int64 [tokens]
    """

    hidden: Hidden
    targets: torch.Tensor
    documents: torch.Tensor

    def losses(self, bias: torch.Tensor) -> torch.Tensor:
        """float32 [tokens], nats, with these biases [V] added to the logits."""
        parts = [
            F.cross_entropy(logits + bias, self.targets[part], reduction="none")
            for part, logits in self.hidden.logits()
        ]
        return torch.cat(parts)


@torch.no_grad()
def sample_of(subject: Subject, split: str, category: str, sequences: int | None) -> FitSample:
    """Raises ValueError where the split has nothing of the category."""
    states, targets, documents = [], [], []
    for batch in subject.batches(split, category, sequences):
        ids, goals, plan = batch.on(subject.device, subject.tables)
        assert batch.owners is not None  # it is of an evaluation
        hidden, chosen = subject.hidden(ids, plan), goals.flatten() != IGNORE
        states.append(hidden.x[chosen])
        targets.append(goals.flatten()[chosen])
        documents.append(batch.owners.index.flatten().to(subject.device)[chosen])
    return FitSample(hidden._replace(x=torch.cat(states)), torch.cat(targets), torch.cat(documents))


@torch.no_grad()
def fit(forget: Sequence[FitSample], retain: Sequence[FitSample], weight: float = RETAIN_WEIGHT) -> torch.Tensor:
    """Biases fp32 [V] at the optimum. Raises ValueError without forget data."""
    if not forget:
        raise ValueError("a calibration needs forget data to be fitted on")
    groups = [(list(forget), 1.0)] + ([(list(retain), weight)] if retain else [])
    whole = sum(factor for _, factor in groups)
    shares = [(samples, factor / whole / targets_of(samples)) for samples, factor in groups]
    scale = 1 / (2 * PRIOR**2 * targets_of(forget) * whole)
    first = forget[0].hidden.weight
    # Frequent tokens curve the objective far more than rare ones: each bias is scaled by its own frequency.
    curvature = first.new_full((len(first),), 2 * scale, dtype=torch.float32)
    for samples, share in shares:
        for sample in samples:
            curvature += share * sum(logits.softmax(-1).sum(0) for _, logits in sample.hidden.logits())
    unit = curvature.rsqrt()
    scaled = torch.zeros_like(unit)
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> float:
        bias = scaled * unit
        total, gradient = scale * float(bias.square().sum()), 2 * scale * bias
        for samples, share in shares:
            for sample in samples:
                loss, slope = _loss_and_slope(sample, bias)
                total, gradient = total + share * loss, gradient + share * slope
        scaled.grad = gradient * unit
        return total

    optimizer.step(closure)
    return scaled * unit


def targets_of(samples: Sequence[FitSample]) -> int:
    return sum(len(sample.targets) for sample in samples)


def _loss_and_slope(sample: FitSample, bias: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Sum of the losses, and its gradient [V] by the biases: predicted minus true counts of every token."""
    total, slope = 0.0, -sample.targets.bincount(minlength=len(bias)).to(bias)
    for part, logits in sample.hidden.logits():
        logs = (logits + bias).log_softmax(-1)
        total -= float(logs.gather(1, sample.targets[part][:, None]).double().sum())
        slope += logs.exp_().sum(0)
    return total, slope


class Calibrated(NamedTuple):
    """Losses in nats before and after, by category.

    targets  of the sample that the biases were fitted on, by category
    """

    before: dict[str, Estimate]
    after: dict[str, Estimate]
    targets: dict[str, int]


@torch.no_grad()
def calibrated_losses(
    subject: Subject,
    *,
    forget: Sequence[str],
    retain: Sequence[str],
    split: str = "test",
    sequences: int | None = None,
    fit_sequences: int | None = None,
) -> Calibrated:
    """Of categories: biases are fitted on up to `fit_sequences` sequences of each in the training split.

    fit_sequences  None: as many as hold `TARGETS_PER_TOKEN` targets for each token of the vocabulary, the forget
                   categories together and the retain categories together

    Raises ValueError where a category has no text in one of the splits.
    """
    samples: dict[str, FitSample] = {}
    for names in filter(None, (forget, retain)):
        count = fit_sequences or fit_size(subject, len(names))
        samples |= {name: sample_of(subject, "train", name, count) for name in names}
    bias = fit([samples[name] for name in forget], [samples[name] for name in retain])
    before, after = {}, {}
    for name in (*forget, *retain):
        held_out = sample_of(subject, split, name, sequences)
        before[name] = token_mean(held_out.losses(torch.zeros_like(bias)), held_out.documents)
        after[name] = token_mean(held_out.losses(bias), held_out.documents)
    return Calibrated(before, after, {name: len(sample.targets) for name, sample in samples.items()})


def fit_size(subject: Subject, categories: int) -> int:
    """Sequences of each of so many categories that together have `TARGETS_PER_TOKEN` targets for each token."""
    model = subject.config.model
    return -(-TARGETS_PER_TOKEN * model.vocab_size // (model.context * categories))
