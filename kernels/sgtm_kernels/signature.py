"""Which masks a micro-batch has: all that a compiled graph may depend on.

A graph that depended on the runs of a plan would serve one micro-batch. It depends on these booleans instead: where one
is False the op is the plain one, which the compiler can fuse; where it is True the masks come from the
plan when the graph runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sgtm_kernels.autograd import captured

if TYPE_CHECKING:
    from sgtm_kernels.plan import MaskPlan, Tables


class Signature(NamedTuple):
    """Each is True where the factor of some label in the micro-batch differs from 1.

    outputs     `active` or `route` of a group
    attn_in, attn_out, mlp_in, mlp_out  the contribution to a group's weights, or (out) to the bias
    norm        the contribution to the norms of the blocks
    documents   True where documents do not attend to one another
    """

    outputs: bool
    attn_in: bool
    attn_out: bool
    mlp_in: bool
    mlp_out: bool
    norm: bool
    documents: bool


def signature_of(tables: Tables, labels: tuple[int, ...], documents: bool) -> Signature:
    """Of a micro-batch with these labels."""
    groups, joint = range(len(tables.groups)), tables.update_joint

    def contributes(projection: str) -> bool:
        partial = any(tables.contribution(projection, label, group) != 1 for label in labels for group in groups)
        return partial or any(joint.get(f"{projection}_bias", {label: 1.0})[label] != 1 for label in labels)

    both = (tables.active, tables.route)
    return Signature(
        outputs=any(table[label][group] != 1 for table in both for label in labels for group in groups),
        attn_in=contributes("attn_in"),
        attn_out=contributes("attn_out"),
        mlp_in=contributes("mlp_in"),
        mlp_out=contributes("mlp_out"),
        norm=any(joint["norm"][label] != 1 for label in labels),
        documents=documents,
    )


def masked(plan: MaskPlan, what: str | None) -> bool:
    """Whether the plan masks `what`, a field of `Signature`; True for any other name, which is not part of a block."""
    return what is not None and getattr(plan.signature, what, True)


def backend_of(backend: str, plan: MaskPlan, *what: str | None) -> str:
    """The backend of an op that masks `what`: where a graph is captured and nothing of it is masked, always `torch`.

    There `torch` is plain torch, which the compiler fuses; our kernels are opaque to it.
    """
    if captured() and not any(masked(plan, field) for field in what if field is not None):
        return "torch"
    return backend
