"""The self-check repeats what the run will launch: in its dtype, under all its masks, in every kind of layer."""

from __future__ import annotations

import pytest
import torch

from sgtm.config import load_config
from sgtm.data.random_data import label_pieces
from sgtm.distributed.self_check import calls_of
from sgtm_kernels.plan import MaskPlan

LAYERS = ["--model.layers=4", "--model.window=8", "--masking.masked_layers=[1, 2, 3]"]  # three kinds


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def config_and_calls(request):
    config = load_config("debug", [*LAYERS, f"--train.precision={request.param}", "--data.mixing=token"])
    return config, calls_of(config, torch.device("cpu"))


def plans(calls, learns: bool) -> list[MaskPlan]:
    return [a for call in calls if call.learns is learns for a in call.arguments if isinstance(a, MaskPlan)]


def test_the_dtype_is_that_of_the_run(config_and_calls):
    config, calls = config_and_calls
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
    for op in ("linear", "mlp", "attention", "embedding"):
        dtypes = {a.dtype for call in calls if call.op == op for a in call.arguments
                  if isinstance(a, torch.Tensor) and a.is_floating_point()}  # fmt: skip
        assert dtype in dtypes and dtypes <= {dtype, torch.float32}, op


def test_every_mask_of_training_occurs(config_and_calls):
    config, calls = config_and_calls
    wanted = {frozenset(labels) for labels in label_pieces(config, len(config.tables.labels))}
    assert {frozenset(plan.present) for plan in plans(calls, True) if plan.tables == config.tables} >= wanted
    assert len(wanted) > 3


def test_evaluations_are_among_them(config_and_calls):
    config, calls = config_and_calls
    removed = config.space.group_of(config.space.domains[0])
    active = {plan.tables.active[0][removed] for plan in plans(calls, False)}
    assert active == {0.0, 1.0} and {call.op for call in calls if not call.learns} >= {"attention", "cross_entropy"}


def test_every_kind_of_layer_occurs(config_and_calls):
    """Global and windowed, with a domain's heads and without; arguments 1 and 4 of `attention`."""
    _, calls = config_and_calls
    kinds = {(len(layout.heads), window) for _, layout, _, _, window, *_ in
             (call.arguments for call in calls if call.function == "attention" and call.learns)}  # fmt: skip
    assert len({window for _, window in kinds}) == 2 and len(kinds) == 3
