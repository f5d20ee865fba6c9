"""The sections of a config: what their keys take together."""

import pytest
from pydantic import ValidationError

from sgtm.config import load_config
from sgtm.config.sections import DistributedConfig


def test_the_old_name_of_a_backend_works_with_a_note(capsys, monkeypatch):
    from sgtm_kernels import _note_renamed

    _note_renamed.cache_clear()
    for _ in range(2):
        assert load_config("debug", ["--kernels.backend=runs"]).kernels.backend == "torch"
    assert capsys.readouterr().err == "note: kernel backend 'runs' is now 'torch'\n"


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
