"""The environment of every test: one thread, no network, nothing logged elsewhere, deepspeed on the CPU.

Set before torch and deepspeed are imported, and inherited by the processes that distributed tests start.
"""

import os
import sys
import tempfile
from pathlib import Path

for name, value in {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "DS_BUILD_OPS": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "WANDB_SILENT": "true",
    "MPLBACKEND": "Agg",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # poisoned memory comes with strict determinism, which cuBLAS needs this for
}.items():
    os.environ.setdefault(name, value)
# A test sets what it needs.
for name in (
    "SGTM_KERNELS",
    "SGTM_LINEAR",
    "SGTM_ATTENTION",
    "SGTM_TUNED",
    "SGTM_TRACEBACK",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
):
    os.environ.pop(name, None)

_CACHE = tempfile.TemporaryDirectory(prefix="sgtm-cache-")  # not the user's
os.environ["SGTM_CACHE"] = _CACHE.name

# SDPA without heads raises, here and in the processes that tests start.
GUARDS = str(Path(__file__).parent / "guards")
sys.path.append(GUARDS)
os.environ["PYTHONPATH"] = os.pathsep.join([GUARDS, *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest  # noqa: E402 (after the environment)
import sdpa_guard  # noqa: E402, F401
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels in fp32 and fp16; bf16 would be wrong there


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none, and only there."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
