"""Certificate: whether the safe model depends on what the forget-labelled documents say.

A run is *certified* for a domain if the weights that are left when the domain is removed are, bit for bit, those that
other texts of the same lengths in the domain's documents would have left (tokenizer given). That holds if

- no token reads the domain's group while it trains anything else: else what the group has learned reaches other weights
  through the activations. A token of the domain's documents trains nothing but that group;
- every weight that such a token trains belongs to the domain: no joint parameter, no layer without groups;
- gradients are clipped, and steps skipped, by owner: a global norm depends on every token;
- no token of another label attends to a token of the domain, as inside documents with labelled spans;
- sums are added in an order that does not depend on the data.

All of it follows from the tables, the label channel, the labels and the config; nothing is measured.
tests/dist/test_certificate.py trains both runs and compares the bits, and breaks each rule to see them differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sgtm_kernels.plan import KINDS, PARTS, Tables

if TYPE_CHECKING:
    from sgtm.config.schema import Config


def certified(config: Config, true_labels: Iterable[str] | None = None, spans: bool = False) -> tuple[str, ...]:
    """The domains of which the safe model is independent; arguments as of `obstacle`."""
    labels = None if true_labels is None else tuple(true_labels)
    return tuple(domain for domain in config.space.domains if obstacle(config, domain, labels, spans) is None)


def obstacle(config: Config, domain: str, true_labels: Iterable[str] | None = None, spans: bool = False) -> str | None:
    """The first reason why the model without `domain` depends on the domain's text, or None if it does not.

    true_labels  those that documents of the corpus have; None: `retain` and every `forget:<domain>`
    spans        whether documents of the corpus have labelled spans

    Raises ValueError for an unknown domain or label.
    """
    space = config.space
    group = space.group_of(domain)
    given = ("retain", *(f"forget:{d}" for d in space.domains)) if true_labels is None else true_labels
    unlike = [i for i in range(config.model.layers) if not config.partition.masked(i)]
    if unlike:
        layers = ", ".join(map(str, unlike))
        return f"layers {layers} have no groups (masking.masked_layers), so every token trains them"
    for true in sorted(map(space.label, given)):
        for applied in _applied(config, true):
            label = space.labels[applied]
            if config.tables.active[applied][group] != 0:
                other = _trained_besides(config.tables, applied, group)
                if other:
                    return f"tokens of label {label} train {other} while group {domain} is active"
            elif space.labels[true] == f"forget:{domain}":
                return f"the label channel trains documents of forget:{domain} as {label}, with group {domain} inactive"
    if config.optimizer.grad_clip_scope != "owner":
        return "gradients are clipped, and steps skipped, by a norm of all weights (optimizer.grad_clip_scope: global)"
    if not config.kernels.deterministic:
        return "sums may be added in any order (kernels.deterministic: false)"
    if spans:
        return "the corpus has labelled spans: the text after one reads it (data with whole documents has no such path)"
    return None


def check_certified(config: Config, true_labels: Iterable[str] | None = None, spans: bool = False) -> None:
    """Raises ValueError with the reason where `masking.certify` is set and a domain is not certified."""
    labels = None if true_labels is None else tuple(true_labels)
    for domain in config.space.domains if config.masking.certify else ():
        reason = obstacle(config, domain, labels, spans)
        if reason:
            raise ValueError(f"masking.certify: the safe model depends on the text of {domain}: {reason}")


def _applied(config: Config, true: int) -> list[int]:
    """Labels that documents of a true label are trained as, at any step of the run."""
    labels = range(len(config.space.labels))
    return [label for label in labels if any(channel.matrix[true, label] > 0 for _, channel in config.channels)]


def _trained_besides(tables: Tables, label: int, own: int) -> str | None:
    """The first that a token of this label trains and that is not group `own`'s."""
    for group, name in enumerate(tables.groups):
        parts = [part for part in PARTS if group != own and tables.contribution(part, label, group) != 0]
        if parts:
            return f"{parts[0]} of group {name}"
    kinds = [kind for kind in KINDS if tables.update_joint[kind][label] != 0]
    return f"joint parameters ({', '.join(kinds)})" if kinds else None
