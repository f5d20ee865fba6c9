"""Settings that `apply_sgtm` takes: sgtm/integrations/settings.py."""

import pytest

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.settings import check_masking, space_of


def test_keys_and_section_are_alike():
    config = check_masking({"domains": ["bio"], "strategy": "gram"})
    assert config == check_masking(config) == MaskingConfig(domains=["bio"], strategy="gram")
    assert space_of(config).labels == ("unlabeled", "retain", "forget:bio", "open:bio")


@pytest.mark.parametrize(
    ("key", "value"), [("certify", True), ("domain_embedding", 4), ("strategy", "sgtn"), ("domain", ["bio"])]
)
def test_what_cannot_be_done_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        check_masking({key: value})


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        ({"forget_head": 2}, "masking: forget_head: unknown key; did you mean forget_heads?"),
        ({"strategy": "sgtn"}, "masking: strategy: found 'sgtn', but it takes: one of none, sgtm, "),
        ({"recipe": "dual"}, "masking: a recipe also sets the labels of the data"),
        ("dual", "masking is 'dual'; give its keys and values, such as {'domains': ['bio']}"),
    ],
)
def test_mistakes_are_named_as_in_a_file(masking, message):
    with pytest.raises(ValueError) as error:
        check_masking(masking)
    assert str(error.value).startswith(message)
