"""The sections of a config: what their keys take together."""

import pytest
from configs import message
from pydantic import ValidationError

from sgtm.config import load_config
from sgtm.config.sections import DistributedConfig, ModelConfig


def test_the_old_name_of_a_backend_works_with_a_note(capsys, monkeypatch):
    from sgtm_kernels import _note_renamed

    _note_renamed.cache_clear()
    for _ in range(2):
        assert load_config("debug", ["--kernels.backend=runs"]).kernels.backend == "torch"
    assert capsys.readouterr().err == "note: kernel backend 'runs' is now 'torch'\n"


LLAMA = ["--model.family=llama", "--model.window=null"]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["--model.hidden_size=33"], "hidden_size 33 is not a multiple of heads 4; set head_dim"),
        ([*LLAMA, "--model.kv_heads=3"], "heads 4 is not a multiple of kv_heads 3; kv_heads must divide it"),
        (["--model.kv_heads=2"], "kv_heads 2: family gpt_neo has a KV head for each of heads 4; set kv_heads null, or"),
        (
            ["--model.tie_embeddings=false"],
            "tie_embeddings false: family gpt_neo always ties; set it true, or",
        ),
        (["--model.head_dim=4"], "head_dim 4: family gpt_neo takes hidden_size / heads alone; set head_dim null"),
        ([*LLAMA, "--model.window=8"], "window 8: family llama has none; set window null, or family gpt_neo"),
        ([*LLAMA, "--model.head_bias=true"], "head_bias true: family llama has none; set it false, or family gpt_neo"),
    ],
)
def test_a_shape_that_a_family_does_not_have_is_refused(overrides, rule):
    assert message("debug", *overrides).startswith(f"debug: model: {rule}")


@pytest.mark.parametrize(
    "overrides", [["--model.heads=3", "--model.head_dim=5"], ["--model.kv_heads=2", "--masking.forget_heads=2"]]
)
def test_llama_takes_any_width_of_head_and_fewer_kv_heads(overrides):
    load_config("debug", [*LLAMA, "--masking.strategy=none", *overrides])


def test_sections_take_no_other_keys_and_do_not_change():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DistributedConfig(zero=1)
    section = DistributedConfig()
    with pytest.raises(ValidationError, match="Instance is frozen"):
        section.zero_stage = 3


def test_an_optimizer_is_offloaded_where_zero_shards_it():
    """The rules of ZeRO++ are tested in tests/dist/test_zeropp.py."""
    with pytest.raises(ValidationError, match="offload_optimizer: ZeRO 0 keeps the optimizer with the weights; set"):
        DistributedConfig(zero_stage=0, offload_optimizer=True)


def test_a_gradient_is_reduced_to_owners_where_a_rank_has_a_megabyte_for_each_rank():
    """Of 8 ranks each owns 8 MB of fp32 in a gradient of 16 million entries."""
    distributed = DistributedConfig()
    assert distributed.reduces_to_owners(16_000_000, 8) and not distributed.reduces_to_owners(15_999_999, 8)
    assert distributed.reduces_to_owners(250_000, 1) and not distributed.reduces_to_owners(249_999, 1)


def test_a_section_of_a_model_without_a_size_is_refused():
    with pytest.raises(ValidationError, match="vocab_size\n  Field required"):
        ModelConfig(layers=1, hidden_size=8, heads=2, intermediate_size=8, context=8)
