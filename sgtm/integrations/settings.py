"""The `masking` settings that `apply_sgtm` and the collator take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgtm.config.sections import MaskingConfig
from sgtm.masking.labels import LabelSpace


def check_masking(masking: MaskingConfig | Mapping[str, Any]) -> MaskingConfig:
    """The section `masking`, from itself or from its keys.

    Raises ValueError for unknown keys and values, and for what needs our own transformer or our own data.
    """
    config = masking if isinstance(masking, MaskingConfig) else MaskingConfig(**masking)
    if config.domain_embedding != "none":
        raise ValueError(
            f"masking.domain_embedding {config.domain_embedding!r} adds weights, which a Hugging Face model has no "
            f"place for; set it to none"
        )
    if config.certify:
        raise ValueError("masking.certify true checks the data of `sgtm train`, which are not known here; set it false")
    return config


def space_of(config: MaskingConfig) -> LabelSpace:
    """All labels of the domains, those of `open:<domain>` too."""
    return LabelSpace(tuple(config.domains), tuple(config.domains))
