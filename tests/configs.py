"""What loading a config that is wrong prints."""

from __future__ import annotations

import pytest

from sgtm.config import ConfigError, load_config


def message(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, list(overrides))
    return str(caught.value)
