"""Losses of unmasked and filtered training that ship with the presets, for a run's own to stand beside.

A file NAME.json belongs to the preset NAME. benchmarks/recipes.py writes it from the results of a sweep: means over its
seeds. `sgtm quickstart`, `eval` and `report` show it where the config has the model, optimizer, length and data of that
sweep. They are the `baselines` of a summary, as are the runs that `sgtm report --baseline` puts there
(sgtm/report/beside.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.config.schema import Config

FOLDER = Path(__file__).parent


def shipped_baselines(config: Config) -> dict[str, dict[str, float]]:
    """{baseline: {category: loss in nats per token}}; empty where none were made with what this config trains."""
    file = FOLDER / f"{config.name}.json"
    if not file.is_file():
        return {}
    shipped = json.loads(file.read_text("utf-8"))
    ours = basis(config)
    for section, values in ours.items():
        for key in (
            values.keys() - shipped["basis"][section].keys()
        ):  # younger than the losses, so nothing but its default
            shipped["basis"][section][key] = type(getattr(config, section)).model_fields[key].get_default()
    return shipped["losses"] if shipped["basis"] == ours else {}


def with_shipped(summary: dict, config: Config) -> dict:
    """The summary with the shipped baselines; unchanged where there are none, or the run is not at its end."""
    shipped = shipped_baselines(config) if summary.get("steps") == summary.get("of_steps") else {}
    return {**summary, "baselines": shipped} if shipped else summary


def basis(config: Config) -> dict:
    """What a run must have in common with the runs behind the shipped losses."""
    values = config.spelled_out()
    shared = {section: values[section] for section in ("model", "optimizer")}
    del shared["optimizer"]["grad_clip_scope"]  # a recipe sets it
    train = {key: getattr(config.train, key) for key in ("steps", "tokens_per_step", "precision", "init_from")}
    data = {key: getattr(config.data, key) for key in ("path", "mixing", "isolate_documents", "upsample")}
    return {**shared, "train": train, "data": data}
