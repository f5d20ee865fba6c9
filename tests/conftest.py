"""The environment of every test: one thread, no network, nothing logged elsewhere, deepspeed on the CPU.

Set before torch and deepspeed are imported, and inherited by the processes that distributed tests start.
"""

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

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
import warm  # noqa: E402
from process_starts import process_starts  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels in fp32 and fp16; bf16 would be wrong there
warm.install()
if find_spec("pydantic"):  # it is missing on a bare machine, where the tests of the kernels alone run
    import shared_corpus

    shared_corpus.install()


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="no test that starts a process, few cases of each: make quick"
    )


def pytest_unconfigure(config):
    _CACHE.cleanup()  # processes of xdist and of tests/mutants.py end without the finalizer


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu are skipped where there is none, and only there; slow ones come first, so that none is last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("--quick"):
        selection = _few_of_each(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in selection])
        items[:] = [item for item in items if item in selection]


def _few_of_each(items) -> set:
    """The first and the last case of every test that is not slow."""
    by_function: dict[str, list] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {case for cases in by_function.values() for case in (cases[0], cases[-1])}


@pytest.fixture(autouse=True, scope="session")
def _no_processes(request):
    """With `--quick` a test is skipped where it starts a process."""
    if not request.config.getoption("--quick"):
        yield
        return

    def skip(*args, **kwargs):
        pytest.skip("starts a process")

    with process_starts(skip):
        yield


@pytest.fixture(autouse=True)
def _cold(request, monkeypatch):
    """What a test marked `cold` starts is a new interpreter."""
    if request.node.get_closest_marker("cold"):
        monkeypatch.setenv(warm.COLD, "1")


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts of benchmarks/ can be imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def ours(benchmarks):
    """(name, dtype) -> a setting, and its model and optimizer, at a tiny shape on the CPU."""

    def build(name: str, dtype: torch.dtype = torch.float32):
        from sgtm.measure.bare import Ours
        from sgtm.measure.models import SETTINGS

        torch.manual_seed(1)
        return SETTINGS[name](), Ours(SETTINGS[name](), torch.device("cpu"), dtype)

    return build


@pytest.fixture
def calls(monkeypatch):
    """The functions behind the commands, replaced by ones that note their arguments."""
    noted = []

    def module(name, **results):
        def noting(function, result):
            def note(*args, **options):
                noted.append((function, args, options))
                return result

            return note

        functions = {function: noting(function, result) for function, result in results.items()}
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))

    module("sgtm.training.loop", train=Path("runs/quickstart"))
    module("sgtm.run.evaluate", evaluate_run={"losses": {}}, write_summary=None)
    module("sgtm.hf.export", export_run=None)
    monkeypatch.setattr(
        "sgtm.report.write_report", lambda *args: noted.append(("write_report", args, {})) or args[0] / "x.html"
    )
    monkeypatch.setattr("sgtm.report.print_summary", lambda summary: noted.append(("print_summary", (summary,), {})))
    return noted


@pytest.fixture
def run(tmp_path):
    """A run directory with a config and nothing else."""
    (tmp_path / "config.yaml").write_text("extends: debug\n")
    return tmp_path
