"""The `masking` settings that `apply_sgtm` and the collator take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sgtm.config.errors import explain_errors
from sgtm.config.sections import MaskingConfig
from sgtm.masking.labels import LabelSpace


def check_masking(masking: MaskingConfig | Mapping[str, Any]) -> MaskingConfig:
    """The section `masking`, from itself or from its keys.

    Raises ValueError for unknown keys and values, and for what needs our own transformer or our own data.
    """
    config = masking if isinstance(masking, MaskingConfig) else _section(masking)
    if config.domain_embedding != "none":
        raise ValueError(
            f"masking.domain_embedding {config.domain_embedding!r} adds weights, which a Hugging Face model has no "
            f"place for; set it to none"
        )
    if config.certify:
        raise ValueError("masking.certify true checks the data of `sgtm train`, which are not known here; set it false")
    return config


def _section(masking: Any) -> MaskingConfig:
    if not isinstance(masking, Mapping):
        raise ValueError(f"masking is {masking!r}; give its keys and values, such as {{'domains': ['bio']}}")
    if "recipe" in masking:
        raise ValueError(
            "masking: a recipe also sets the labels of the data, which are not known here; give its keys of the "
            "section masking, and draw the labels (docs/recipes.md)"
        )
    try:
        return MaskingConfig(**masking)
    except ValidationError as error:
        raise ValueError(explain_errors(error, MaskingConfig, dict(masking), "masking", set())) from None


def space_of(config: MaskingConfig) -> LabelSpace:
    """All labels of the domains, those of `open:<domain>` too."""
    return LabelSpace(tuple(config.domains), tuple(config.domains))
