"""The heads of the projection as attention takes them in the backend `torch`."""

import pytest
import torch

from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.attention import pytorch as attention_pytorch
from sgtm_kernels.attention.heads import cut, heads
from sgtm_kernels.attention.op import rotate
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import assert_same_bits, forward_backward, random_like, random_tables

pytestmark = pytest.mark.cpu
BATCH, SEQ_LEN = 3, 10
LAYOUTS = {
    "one group": HeadLayout((4,), (4,), 8),
    "two groups": HeadLayout((3, 2), (3, 2), 8),
    "grouped queries": HeadLayout((4, 2), (2, 1), 8),
    "none in one": HeadLayout((4, 0, 2), (2, 0, 1), 8),
    "moved back as moved": HeadLayout((2, 2, 2), (2, 2, 2), 8),  # the order is its own inverse
    "unlike shares": HeadLayout((4, 2), (2, 2), 8),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def plan_of(values: tuple[float, ...], layout: HeadLayout) -> MaskPlan:
    return MaskPlan.uniform(random_tables(1, values, groups=len(layout.heads)), 0, BATCH, SEQ_LEN)


def projection(layout: HeadLayout, dtype=torch.float32) -> torch.Tensor:
    columns = (sum(layout.heads) + 2 * sum(layout.kv_heads)) * layout.head_dim
    return random_like(torch.empty(BATCH, SEQ_LEN, columns, dtype=dtype), 2)


def by_hand(x, layout, together, rotary):
    """q, k, v of each group by views, then those of all groups together."""
    groups = layout.split(x)
    if rotary is not None:
        groups = [(rotate(q, rotary), rotate(k, rotary), v) for q, k, v in groups]
    if together:
        return [torch.cat(parts, 1) for parts in zip(*groups, strict=True)]
    return [piece for group in groups for piece in group]


@layouts
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_pieces_are_the_heads_of_the_groups(turned, together, layout):
    angles = torch.arange(SEQ_LEN, dtype=torch.float64)[:, None] * torch.rand(1, 4, dtype=torch.float64).repeat(1, 2)
    rotary = (angles.cos(), angles.sin()) if turned else None
    plan = plan_of((1.0,), layout)
    tables = attention_pytorch._tables(rotary, torch.float64, plan) if turned else (None, None)
    pieces_of = cut(layout, together, turned, torch.device("cpu"))

    def ours(x):
        pieces = heads(x, *tables, plan, pieces_of)
        pieces = pieces if together else [piece for group in pieces_of.by_group(pieces) for piece in group]
        return torch.cat([piece.flatten() for piece in pieces])

    x = projection(layout, torch.float64)
    results = forward_backward(ours, x)
    wanted = forward_backward(lambda x: torch.cat([p.flatten() for p in by_hand(x, layout, together, rotary)]), x)
    for mine, right in zip(results, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@layouts
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("values", [(1.0,), (0.5,)], ids=["nothing masked", "masked"])
def test_groups_are_attended_to_together_where_nothing_is_masked(values, window, layout, monkeypatch):
    """In one call, and with the bits of a call for each."""
    plan, x, calls = plan_of(values, layout), projection(layout), []

    def attend(q, *arguments):
        calls.append(q.shape[1])
        return original(q, *arguments)

    original = attention_pytorch.attend
    monkeypatch.setattr(attention_pytorch, "attend", attend)
    results = forward_backward(lambda x: attention(x, layout, plan, scale=0.5, window=window), x)
    one = len(layout.heads) == 1
    together = one or (values == (1.0,) and layout != LAYOUTS["unlike shares"])
    assert calls == ([sum(layout.heads)] if together else list(layout.heads))
    if not one:
        monkeypatch.setattr(attention_pytorch, "_cut", lambda *_: (cut(layout, False, False, x.device), False))
        again = forward_backward(lambda x: attention(x, layout, plan_of(values, layout), scale=0.5, window=window), x)
        for mine, right in zip(results, again, strict=True):
            assert_same_bits(mine, right)
