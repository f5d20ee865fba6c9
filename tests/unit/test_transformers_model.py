"""A Hugging Face folder in transformers: sgtm/hf/transformers_model.py."""

from __future__ import annotations

import pytest
import torch
from hf_models import plain_model
from transformers.utils import logging

from sgtm.hf.transformers_model import load_in_transformers


@pytest.mark.parametrize("bars", [True, False])
def test_a_folder_is_loaded_in_fp32_and_bars_stay_as_they_were(tmp_path, bars):
    saved = plain_model("llama").bfloat16()
    saved.save_pretrained(tmp_path)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    model = load_in_transformers(tmp_path, attn_implementation="eager")
    assert logging.is_progress_bar_enabled() is bars
    assert not model.training and model.config._attn_implementation == "eager"
    loaded = model.state_dict()
    for name, tensor in saved.state_dict().items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor.float())


def test_bars_come_back_where_a_folder_does_not_load(tmp_path):
    logging.enable_progress_bar()
    with pytest.raises(ValueError, match="Unrecognized model"):
        load_in_transformers(tmp_path)
    assert logging.is_progress_bar_enabled()
