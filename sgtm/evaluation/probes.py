"""What a linear read-out finds of a domain in the hidden states of each layer.

Ablation may leave knowledge in the residual stream that the head no longer reads. A probe is a head of its own: the
final norm, and a matrix with the head's bias where it has one, fitted on a domain's text of the training split to
predict its next tokens from the residual stream after a layer, everything else frozen. It begins as the model's own
head (a logit lens) and is fitted by Adam for a fixed number of steps, with the learning rate that is best on a part of
that text held out from it. Losses are those of another split. They are to be compared with probes of a model that was
trained without the domain, which show what such a head learns from the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm.data.batch import IGNORE
from sgtm.evaluation.estimates import Estimate, token_mean
from sgtm.evaluation.subject import Subject
from sgtm.model.streams import residual_streams

STEPS, BATCH = 200, 1024  # targets of a step
RATES = (3e-4, 3e-3)
SEQUENCES = 400


class Layer(NamedTuple):
    """x  [targets, D]: normed residual stream after a layer; targets, documents: int64 [targets]"""

    x: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor


class Head(NamedTuple):
    """weight  [V, D]; bias: [V] or None"""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class Probe(NamedTuple):
    """Losses in nats on held-out text: of the model's own head on a layer, and of the fitted one.

    rate    learning rate
    chosen  the fitted head's loss on the text that the rate was chosen by: the layer is to be chosen by it too, as the
            lowest of several held-out losses is too low
    """

    own_head: Estimate
    fitted: Estimate
    rate: float
    chosen: float


@torch.no_grad()
def layers_of(subject: Subject, split: str, category: str, sequences: int | None) -> tuple[list[Layer], Head]:
    """The layers in order, and the model's own head. Raises ValueError where the split has none of the category."""
    model = subject.model
    by_layer: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    goals, documents = [], []
    with residual_streams(model) as streams:
        for batch in subject.batches(split, category, sequences):
            ids, targets, plan = batch.on(subject.device, subject.tables)
            streams.clear()
            _, weight, bias = subject.hidden(ids, plan)
            chosen = targets.flatten() != IGNORE
            goals.append(targets.flatten()[chosen])
            assert batch.owners is not None  # it is of an evaluation
            documents.append(batch.owners.index.flatten().to(subject.device)[chosen])
            for parts, x in zip(by_layer, streams, strict=True):
                parts.append(model.final_norm(x, plan).flatten(0, 1)[chosen].float())
    targets, owners = torch.cat(goals), torch.cat(documents)
    head = Head(weight.float(), None if bias is None else bias.float())
    return [Layer(torch.cat(states), targets, owners) for states in by_layer], head


def probe(fitted_on: Layer, held_out: Layer, own: Head, *, seed: int = 0) -> Probe:
    """The better of the learning rates, by the last fifth of `fitted_on`, which it is not fitted on."""
    edge = len(fitted_on.targets) * 4 // 5
    part, rest = (Layer(*(values[span] for values in fitted_on)) for span in (slice(edge), slice(edge, None)))
    heads = {rate: _fitted(part, own, rate, seed) for rate in RATES}
    losses = {rate: _loss(rest, head).value for rate, head in heads.items()}
    rate = min(RATES, key=lambda rate: losses[rate])
    return Probe(_loss(held_out, own), _loss(held_out, heads[rate]), rate, losses[rate])


def _fitted(layer: Layer, own: Head, rate: float, seed: int) -> Head:
    bias = None if own.bias is None else own.bias.detach().clone().requires_grad_()
    head = Head(own.weight.detach().clone().requires_grad_(), bias)
    optimizer = torch.optim.Adam([part for part in head if part is not None], rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        index = torch.randint(len(layer.targets), (BATCH,), generator=generator).to(layer.x.device)
        loss = F.cross_entropy(F.linear(layer.x[index], *head), layer.targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        optimizer.step()
    return head


@torch.no_grad()
def _loss(layer: Layer, head: Head) -> Estimate:
    pairs = zip(layer.x.split(BATCH), layer.targets.split(BATCH), strict=True)
    losses = [F.cross_entropy(F.linear(x, *head), goals, reduction="none") for x, goals in pairs]
    return token_mean(torch.cat(losses), layer.documents)


def probes(
    subject: Subject,
    category: str,
    *,
    split: str = "test",
    sequences: int = SEQUENCES,
    layers: Sequence[int] | None = None,
) -> dict[int, Probe]:
    """By layer (all, or those named, counted from 0), with up to `sequences` sequences of each split.

    Raises ValueError where one of the splits has no text of the category, or for a layer that the model lacks.
    """
    count = len(subject.model.blocks)
    chosen = range(count) if layers is None else layers
    if wrong := [layer for layer in chosen if not 0 <= layer < count]:
        raise ValueError(f"no layer {wrong[0]}: the model has {count}, counted from 0")
    train, own = layers_of(subject, "train", category, sequences)
    test, _ = layers_of(subject, split, category, sequences)
    return {layer: probe(train[layer], test[layer], own) for layer in chosen}
