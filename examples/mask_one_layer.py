"""Mask one layer of a model of your own with `sgtm_kernels` alone: forget tokens do not reach the retain rows.

python examples/mask_one_layer.py
"""

import torch

from sgtm_kernels.linear import linear_in
from sgtm_kernels.plan import MaskPlan, merge_label_runs
from sgtm_kernels.tables import JOINT_KINDS, PROJECTIONS, Tables

RETAIN, FORGET = 0, 1  # labels, and groups
teaches = ((1.0, 0.0), (0.0, 1.0))  # by label and group: each label teaches its own group
tables = Tables(
    labels=("retain", "forget"),
    groups=("retain", "bio"),
    active=((1.0, 1.0), (1.0, 1.0)),
    route=((1.0, 1.0), (1.0, 1.0)),
    update=dict.fromkeys(PROJECTIONS, teaches),
    update_joint=dict.fromkeys(JOINT_KINDS, (1.0, 1.0)),
)
weight = torch.randn(12, 8, requires_grad=True)  # rows 0:10 belong to retain, 10:12 to bio
bounds = (0, 10, 12)
x = torch.randn(2, 16, 8)  # two sequences: the first is retain, the second forget
plan = MaskPlan(tables, merge_label_runs([RETAIN, FORGET], [16, 16]), batch=2, seq_len=16)

linear_in(x, weight, None, plan, "mlp_in", bounds).sum().backward()
for rows, sequence, learner in ((slice(0, 10), 0, "retain"), (slice(10, 12), 1, "bio")):
    alone = x[sequence].sum(0).expand_as(weight.grad[rows])
    print(f"{learner} rows learn from sequence {sequence} alone:", torch.allclose(weight.grad[rows], alone, atol=1e-5))
