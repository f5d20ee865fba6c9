"""Shapes of models, and the masks under which ops are timed on them.

The masks are those of `sgtm` with one domain and the joint parameters masked (the paper's Wikipedia setting), since
norms, embeddings and the head are not masked at all with them free.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgtm_kernels.attention import HeadLayout
from sgtm_kernels.plan import JOINT_KINDS, PROJECTIONS, LabelRun, MaskPlan, Tables, merge_label_runs

UNLABELED, RETAIN, FORGET = 0, 1, 2
ONES = ((1.0, 1.0),) * 3
NONE = Tables(
    ("unlabeled", "retain", "forget"),
    ("retain", "forget"),
    ONES,
    ONES,
    dict.fromkeys(PROJECTIONS, ONES),
    dict.fromkeys(JOINT_KINDS, (1.0,) * 3),
)
FREE = ("final_norm", "head_bias")  # joint parameters that forget tokens always update
SGTM = Tables(
    NONE.labels,
    NONE.groups,
    ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0)),
    ONES,
    dict.fromkeys(PROJECTIONS, ((1.0, 1.0), (1.0, 1.0), (0.0, 1.0))),
    {kind: (1.0, 1.0, float(kind in FREE)) for kind in JOINT_KINDS},
)


@dataclass(frozen=True)
class Shape:
    """One layer of a model, and the micro-batch it sees. `gated`: SwiGLU, RMSNorm, no biases; else GELU, LayerNorm."""

    batch: int
    seq_len: int
    width: int
    heads: int
    kv_heads: int
    neurons: int
    vocab: int
    forget_heads: int
    forget_neurons: int
    gated: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def layout(self) -> HeadLayout:
        share = self.heads // self.kv_heads
        groups = (self.heads - self.forget_heads, self.forget_heads)
        return HeadLayout(groups, tuple(n // share for n in groups), self.head_dim)


# Twenty sequences: one is 5 %.
SHAPES = {
    "124m": Shape(20, 1024, 768, 12, 12, 3072, 50257, 1, 256),
    "254m": Shape(20, 1024, 1024, 32, 32, 4096, 50257, 1, 64),
    "llama-1b": Shape(4, 4096, 2048, 32, 8, 8192, 128256, 4, 1024, gated=True),
    "tiny": Shape(4, 12, 24, 6, 6, 40, 97, 1, 8),
    "tiny-llama": Shape(4, 12, 24, 6, 3, 40, 97, 2, 8, gated=True),
}


def plans(shape: Shape) -> dict[str, MaskPlan]:
    """The micro-batch under every mask; `unmasked` is what the others are compared with. A share of forget sequences
    that this batch cannot have is left out."""
    by_name = {
        "unmasked": MaskPlan.uniform(NONE, UNLABELED, shape.batch, shape.seq_len),
        "nothing masked": MaskPlan.uniform(SGTM, UNLABELED, shape.batch, shape.seq_len),
    }
    for percent in (5, 25):
        n, rest = divmod(shape.batch * percent, 100)
        if not rest:
            labels = [FORGET] * n + [UNLABELED] * (shape.batch - n)
            by_name[f"{percent} % forget"] = MaskPlan(
                SGTM, merge_label_runs(labels, [shape.seq_len] * shape.batch), shape.batch, shape.seq_len
            )
    edges = range(0, shape.tokens, shape.seq_len // 4)
    runs = tuple(LabelRun(UNLABELED if i % 4 else FORGET, t, t + shape.seq_len // 4) for i, t in enumerate(edges))
    merged = merge_label_runs([run.label for run in runs], [run.end - run.start for run in runs])
    by_name["25 % forget in every sequence"] = MaskPlan(SGTM, merged, shape.batch, shape.seq_len)
    by_name["pure forget"] = MaskPlan.uniform(SGTM, FORGET, shape.batch, shape.seq_len)
    by_name["pure retain"] = MaskPlan.uniform(SGTM, RETAIN, shape.batch, shape.seq_len)
    return by_name
