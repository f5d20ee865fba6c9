"""Gradients of all parameters are complete in one order, whatever the labels of the micro-batch.

ZeRO 2 and 3 reduce them in that order: ranks with other labels would add up gradients of different parameters, and
nothing would say so.
"""

from __future__ import annotations

from itertools import product

import pytest
from families import BIO, FAMILIES, MIXINGS, RETAIN, SPACE, UNLABELED, model_of, plan_of, random_step

from sgtm.masking.strategy import build_tables
from sgtm_kernels.testing import EXACT

TABLES = [build_tables(SPACE, "sgtm", joint) for joint in ("free", "masked", "strict")]
TABLES += [build_tables(SPACE, name) for name in ("gradient_routing", "activation_masking", "none")]


@pytest.mark.parametrize("embedding", ["none", "full", 3])
@pytest.mark.parametrize(("family", "tied"), [(family, tied) for family in FAMILIES for tied in (True, False)])
@pytest.mark.parametrize("backend", EXACT)
def test_one_order_of_gradients(backend, family, tied, embedding):
    model, orders = model_of(family, backend, embedding=embedding, tie_embeddings=tied), set()
    weights = (0.0, 0.3) if model.config.experts else (0.0,)
    done: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: done.append(name))
    for tables in TABLES:
        for mixing in MIXINGS:
            for label in (RETAIN, BIO, UNLABELED) if mixing == "step" else (BIO,):
                for batch, balance in product(random_step(mixing, 3, label), weights):
                    done.clear()
                    loss, _ = model(batch.input_ids, batch.targets, plan_of(batch, tables), 0.1, balance=balance)
                    loss.backward()
                    orders.add(tuple(done))
    assert len(orders) == 1 and len(set(done)) == len(list(model.parameters()))
