"""Distributed pretraining with Selective GradienT Masking.

What the command line does, a script can do:

    config = sgtm.load_config("quickstart", ["--train.steps=100"])
    run = sgtm.train(config)                     # its directory
    summary = sgtm.evaluate(run)                 # losses by removed set and category
    sgtm.export(run, ["es"], "export/safe")      # a Hugging Face folder
    model = sgtm.load_model(run)                 # sgtm.model.transformer.Transformer, fp32

Each name is imported when it is first used, so that `import sgtm` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
_WHERE = {
    "Config": ("sgtm.config", "Config"),
    "load_config": ("sgtm.config", "load_config"),
    "prepare": ("sgtm.data.prepare", "prepare_files"),
    "train": ("sgtm.training.loop", "train"),
    "evaluate": ("sgtm.run.evaluate", "evaluate_run"),
    "export": ("sgtm.hf.export", "export_run"),
    "load_model": ("sgtm.run.evaluate", "load_run_model"),
}
__all__ = ["Config", "__version__", "evaluate", "export", "load_config", "load_model", "prepare", "train"]

if TYPE_CHECKING:
    from sgtm.config import Config, load_config
    from sgtm.data.prepare import prepare_files as prepare
    from sgtm.hf.export import export_run as export
    from sgtm.run.evaluate import evaluate_run as evaluate
    from sgtm.run.evaluate import load_run_model as load_model
    from sgtm.training.loop import train


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'sgtm' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
