"""Configuration: one schema, one rule (defaults < YAML < command line)."""

from sgtm.config.errors import ConfigError
from sgtm.config.load import load_config, preset_names, save_config
from sgtm.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config", "preset_names", "save_config"]
