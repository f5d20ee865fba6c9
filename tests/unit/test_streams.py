"""The residual stream is read after each block, and left alone afterwards."""

from __future__ import annotations

import pytest
import torch
from texts import CONFIG, FORGOTTEN
from tiny import tiny_model

from sgtm.model.streams import residual_streams


def test_streams_are_those_after_the_blocks():
    model = tiny_model(CONFIG)
    with residual_streams(model) as streams:
        hidden, _, _ = model.last_hidden(FORGOTTEN.input_ids, FORGOTTEN.plan)
        model.last_hidden(FORGOTTEN.input_ids, FORGOTTEN.plan)
    assert len(streams) == 2 * len(model.blocks)
    torch.testing.assert_close(model.final_norm(streams[-1], FORGOTTEN.plan), hidden)
    with residual_streams(model, [1]) as second:
        model.last_hidden(FORGOTTEN.input_ids, FORGOTTEN.plan)
    assert len(second) == 1 and torch.equal(second[0], streams[1]) and not torch.equal(streams[0], streams[1])


def test_hooks_are_removed_after_an_error():
    model = tiny_model(CONFIG)
    with pytest.raises(RuntimeError, match="stop"), residual_streams(model) as streams:
        raise RuntimeError("stop")
    model.last_hidden(FORGOTTEN.input_ids, FORGOTTEN.plan)
    assert streams == [] and not any(block._forward_hooks for block in model.blocks)
