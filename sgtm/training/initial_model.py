"""The model of a config before its first step, as training, benchmark and profile take it, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sgtm.config import Config
from sgtm.distributed.agree import together
from sgtm.distributed.env import device_type, kernel_backend
from sgtm.model.compile import check_compiler, compile_blocks
from sgtm.model.transformer import Transformer


def initial_model(config: Config) -> Transformer:
    """Random weights from `train.seed`, blocks compiled where `train.compile` asks for it. A collective call.

    Raises ValueError where blocks cannot be compiled here.
    """
    compiled = config.train.compile == "blocks"
    if compiled:
        together(lambda: check_compiler(device_type(), kernel_backend(config)))
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model, config.partition, kernel_backend(config))
    if compiled:
        compile_blocks(model)
    return model


def export_record(config: Config) -> dict | None:
    """`sgtm_export.json` of the folder that `train.init_from` names; None if it names none, or a model without one.

    A damaged file is an empty record: it certifies nothing.
    """
    if not config.train.init_from:
        return None
    try:
        record = json.loads((Path(config.train.init_from) / "sgtm_export.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
