"""A Hugging Face folder as a model of transformers, by none of our code and none of the folder's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load_in_transformers(folder: Path, **options: Any) -> Any:
    """The folder's causal LM in fp32 and evaluation mode, from local files, without a progress bar.

    options  of `from_pretrained`, such as `attn_implementation`

    Raises what transformers, safetensors or huggingface_hub raise, each of them errors of its own.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval()
