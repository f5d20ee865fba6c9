"""Certificate: whether the safe model depends on what the forget-labelled documents say.

A run is *certified* for a domain if the weights that are left when the domain is removed are, bit for bit, those that
other texts of the same lengths in the domain's documents would have left, given the tokenizer, the split and the
initial weights. That holds if

- no token reads the domain's group while it trains anything else: else what the group has learned reaches other weights
  through the activations. A token of the domain's documents trains nothing but that group;
- every weight that such a token trains belongs to the domain: no joint parameter, no layer without groups;
- gradients are clipped, and steps skipped, by owner: a global norm depends on every token;
- no token of another label attends to a token of the domain, as inside documents with labelled spans;
- which of the domain's documents are trained does not follow from their text, as it does with a fractional
  `data.upsample`, which draws them by a hash of it (as `split: {hash: ...}` does when the data are prepared);
- sums are added in an order that does not depend on the data;
- no direction is added to activations (`steering`), as it was measured on such documents;
- weights to start from (`train.init_from`), if an earlier run has trained them, are an export that was independent of
  the domain itself.

All of it follows from the tables, the label channel, the labels and the config; nothing is measured. Activations are
taken to be finite where labels change inside sequences (`data.mixing: token`): there a masked token's enter as times 0.
tests/dist/test_certificate.py trains both runs and compares the bits, and breaks each rule to see them differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sgtm.masking.channel import LabelChannel
from sgtm.masking.labels import UNLABELED, LabelSpace
from sgtm.masking.partition import ENDS, Partition
from sgtm_kernels.tables import JOINT_KINDS, PROJECTIONS, Tables

UNLABELED_REMEDY = (
    "; train unlabeled documents as the domain's (data.channel, beside the rows of the other labels: unlabeled: "
    '{{"forget:{}": 1}}), or leave their categories out (data.upsample CATEGORY: 0)'
)


@dataclass(frozen=True)
class Conditions:
    """What a certificate depends on besides the corpus and the initial weights; `Config.conditions` has a run's.

    channels        (first step, channel), in order of the steps
    upsample        `data.upsample`
    clips_by_owner  whether gradients are clipped, and steps skipped, by owner (`optimizer.grad_clip_scope`)
    deterministic   whether sums are added in a fixed order (`kernels.deterministic`)
    certify         whether every domain must be certified (`masking.certify`)
    steered         whether a direction is added to the residual stream (`steering`)
    """

    space: LabelSpace
    tables: Tables
    partition: Partition
    channels: tuple[tuple[int, LabelChannel], ...]
    upsample: Mapping[str, float]
    clips_by_owner: bool
    deterministic: bool
    certify: bool
    steered: bool = False


def certified(
    conditions: Conditions,
    categories: Mapping[str, str] | None = None,
    spans: bool = False,
    initial: Mapping | None = None,
) -> tuple[str, ...]:
    """The domains of which the safe model is independent; arguments as of `obstacle`."""
    reasons = {domain: obstacle(conditions, domain, categories, spans, initial) for domain in conditions.space.domains}
    return tuple(domain for domain, reason in reasons.items() if reason is None)


def obstacle(
    conditions: Conditions,
    domain: str,
    categories: Mapping[str, str] | None = None,
    spans: bool = False,
    initial: Mapping | None = None,
) -> str | None:
    """The first reason why the model without `domain` depends on the domain's text, or None if it does not.

    categories  true label of each category that is trained; None: not known, so retain and every domain have one each,
                and `data.upsample` may name any
    spans       whether documents of the corpus have labelled spans
    initial     `sgtm_export.json` of the export that `train.init_from` names; None: random weights, or those of a model
                that is no export

    Raises ValueError for an unknown domain or label.
    """
    space = conditions.space
    group = space.group_of(domain)
    trained = ["retain", *(f"forget:{d}" for d in space.domains)]
    if categories is not None:
        trained = [label for name, label in categories.items() if conditions.upsample.get(name) != 0]
    without = [i for i in range(len(conditions.partition.layers)) if not conditions.partition.masked(i)]
    if without:
        layers = ", ".join(map(str, without))
        return f"layers {layers} have no groups (masking.masked_layers), so every token trains them"
    for true in sorted({space.label(name) for name in trained}):
        for applied in _applied(conditions, true):
            label = space.labels[applied]
            if conditions.tables.active[applied][group] != 0:
                other = _trained_besides(conditions, applied, group)
                if other:
                    remedy = UNLABELED_REMEDY.format(domain) if (true, applied) == (UNLABELED, UNLABELED) else ""
                    return f"tokens of label {label} train {other} while group {domain} is active{remedy}"
            elif space.labels[true] == f"forget:{domain}":
                return f"the label channel trains documents of forget:{domain} as {label}, with group {domain} inactive"
    for category, factor in conditions.upsample.items():
        if factor % 1 and (categories is None or categories.get(category) == f"forget:{domain}"):
            return f"data.upsample {factor:g} draws documents of {category} by their text; take a whole number"
    if not conditions.clips_by_owner:
        return "gradients are clipped, and steps skipped, by a norm of all weights (optimizer.grad_clip_scope: global)"
    if not conditions.deterministic:
        return "sums may be added in any order (kernels.deterministic: false)"
    if conditions.steered:
        return "a direction is added that was measured on documents of a domain (steering.direction)"
    if spans:
        return "the corpus has labelled spans: the text after one reads it (data with whole documents has no such path)"
    if initial is not None and domain not in initial.get("independent_of", ()):
        return f"the run starts from an export that is not independent of {domain} (train.init_from)"
    return None


def check_certified(
    conditions: Conditions,
    categories: Mapping[str, str] | None = None,
    spans: bool = False,
    initial: Mapping | None = None,
) -> None:
    """Raises ValueError with the reason where `masking.certify` is set and a domain is not certified."""
    for domain in conditions.space.domains if conditions.certify else ():
        reason = obstacle(conditions, domain, categories, spans, initial)
        if reason:
            raise ValueError(f"masking.certify: the safe model depends on the text of {domain}: {reason}")


def _applied(conditions: Conditions, true: int) -> list[int]:
    """Labels that documents of a true label are trained as, at any step of the run."""
    labels = range(len(conditions.space.labels))
    return [label for label in labels if any(channel.matrix[true, label] > 0 for _, channel in conditions.channels)]


def _trained_besides(conditions: Conditions, label: int, own: int) -> str | None:
    """Weights outside group `own` that tokens of this label train, the first of them; None if there are none."""
    tables, owned = conditions.tables, ENDS if conditions.partition.embedding != "none" else ()
    for group, name in enumerate(tables.groups):
        for projection in (*PROJECTIONS, *(owned if group else ())):
            if group != own and tables.contribution(projection, label, group) != 0:
                return f"{projection} of group {name}"
    kinds = [kind for kind in JOINT_KINDS if tables.update_joint[kind][label] != 0]
    return f"joint parameters ({', '.join(kinds)})" if kinds else None
