"""Steps as the benchmarks take them, for the tests of both models that they time."""

import pytest
import torch
from bare import ROOT


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts of benchmarks/ can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def ours(benchmarks):
    """(name, dtype) -> a setting, and its model and optimizer, at a tiny shape on the CPU."""

    def build(name: str, dtype: torch.dtype = torch.float32):
        from sgtm.measure.bare import Ours
        from sgtm.measure.models import SETTINGS

        torch.manual_seed(1)
        return SETTINGS[name](), Ours(SETTINGS[name](), torch.device("cpu"), dtype)

    return build
