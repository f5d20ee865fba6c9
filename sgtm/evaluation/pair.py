"""Two attacks that need both models: the full and the ablated one are public.

Guided decoding (arXiv 2505.24379, there for a model before and after unlearning): the difference of their logits points
at what the domain's group adds, so an attacker decodes from

    full + strength * (full - ablated)

and recites more of the training text than the full model by itself does. 0 is the full model, -1 the ablated one.

Extrapolation: of exports in which a domain is at strengths a and b, two points of a straight line, the weights at
strength 1 are arithmetic. So an export at any strength above 0 is worth the full model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sgtm.evaluation.memorisation import Recital, recited
from sgtm.evaluation.subject import Subject


@torch.no_grad()
def guided_recital(full: Subject, ablated: Subject, texts: Sequence[Sequence[int]], strength: float) -> Recital:
    """Extraction strength and exact memorisation of texts (token ids, each cut to the context) by guided decoding.

    Raises ValueError for a text of less than two tokens, and for subjects of different vocabularies.
    """
    vocabularies = [subject.config.model.vocab_size for subject in (full, ablated)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(f"the two models have different vocabularies: {vocabularies[0]} and {vocabularies[1]} tokens")
    context = min(subject.config.model.context for subject in (full, ablated))

    def likeliest(ids: torch.Tensor) -> torch.Tensor:
        pieces = (subject.hidden(ids, subject.plan(ids)).logits() for subject in (full, ablated))
        return torch.cat([(a + strength * (a - b)).argmax(-1) for (_, a), (_, b) in zip(*pieces, strict=True)])

    return recited(texts, likeliest, context, full.device)


def extrapolated(
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    strengths: tuple[float, float],
    to: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Weights at strength `to`, from those of two exports at other strengths, by name, in the first one's dtype.

    Raises ValueError for exports of equal strength, or whose tensors differ in name or shape.
    """
    low, high = strengths
    if low == high:
        raise ValueError(f"both exports are at strength {low:g}: a line needs two points")
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (first, second)]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"the exports differ in {', '.join(differing[:3])}: nothing to extrapolate")
    share = (to - low) / (high - low)
    return {
        name: torch.lerp(tensor.double(), second[name].double(), share).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in first.items()
    }
