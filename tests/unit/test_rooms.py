"""No room imports from one listed below it (see tests/rooms.py), and modules have test files by name."""

import ast
import re
from pathlib import Path

import pytest
import rooms


def test_imports_go_downward(capsys):
    assert rooms.main() == 0, capsys.readouterr().out


def tree(tmp_path: Path, monkeypatch, files: dict[str, str]) -> None:
    """A repository of these files."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(rooms, "ROOT", tmp_path)


LOADER, LINEAR = "sgtm/data/loader.py", "kernels/sgtm_kernels/linear/kernel.py"
UPWARD = "sgtm.data is below sgtm.training"
TOOLS = "below sgtm_kernels.tools"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (LOADER, "\nfrom sgtm.training.step import train_step", f":2 imports sgtm.training.step.train_step: {UPWARD}"),
        (LOADER, "from sgtm import training", f":1 imports sgtm.training: {UPWARD}"),
        (LOADER, "def f():\n    import sgtm.training.loop", f":2 imports sgtm.training.loop: {UPWARD}"),
        (LOADER, "from ..training.step import a", ":1 imports ..training.step: write the module's full name"),
        (LOADER, "from .. import training", ":1 imports ..: write the module's full name"),
        (LOADER, "from . import batch", ":1 imports .: write the module's full name"),
        (LOADER, "import_module('.step', 'sgtm.training')", ":1 imports .step: write the module's full name"),
        (LOADER, "if TYPE_CHECKING:\n    pass\nelse:\n    import sgtm.training", f":4 imports sgtm.training: {UPWARD}"),
        (LOADER, "importlib.import_module('sgtm.training.step')", f":1 imports sgtm.training.step: {UPWARD}"),
        (LOADER, "import_module('sgtm.training')", f":1 imports sgtm.training: {UPWARD}"),
        (LOADER, "__import__('sgtm.training')", f":1 imports sgtm.training: {UPWARD}"),
        (LOADER, "import sgtm\nsgtm.train", ":1 imports sgtm: its names reach every room"),
        (LOADER, "from sgtm import train", ":1 imports sgtm.train: sgtm.train is in no room"),
        (LOADER, "from sgtm_kernels.linear.variants import a", f" sgtm.data is {TOOLS}"),
        ("sgtm/training/step.py", "from sgtm_kernels.linear import variants", f" sgtm.training is {TOOLS}"),
        ("sgtm/training/step.py", "import sgtm_kernels.tools.tune", f" sgtm.training is {TOOLS}"),
        (LINEAR, "from sgtm_kernels.tools.launches import KernelVariant", f" sgtm_kernels is {TOOLS}"),
        (LINEAR, "from sgtm_kernels.linear.variants import variants", f" sgtm_kernels is {TOOLS}"),
        (LINEAR, "from sgtm.masking.labels import RETAIN", " the kernels import nothing of sgtm"),
        ("kernels/sgtm_kernels/tools/aot.py", "import sgtm.data", " the kernels import nothing of sgtm"),
    ],
)
def test_an_import_that_breaks_a_rule_is_printed(tmp_path, monkeypatch, capsys, file, text, expected):
    tree(tmp_path, monkeypatch, {file: text})
    assert rooms.main() == 1
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{file}:") and expected in line


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (LOADER, "if TYPE_CHECKING:\n    from sgtm.training.step import train_step"),
        (LOADER, "from sgtm import __version__"),
        (LOADER, "import_module(name)\nimport_module('json')\nfrom sgtm_kernels import plan"),
        ("sgtm/measure/bench.py", "from sgtm_kernels.tools.tune import tune\nimport sgtm_kernels.linear.variants"),
        ("kernels/sgtm_kernels/linear/variants.py", "from sgtm_kernels.tools.launches import KernelVariant"),
    ],
)
def test_other_imports_are_free(tmp_path, monkeypatch, capsys, file, text):
    tree(tmp_path, monkeypatch, {file: text})
    assert rooms.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "ring"),
    [
        ({"a": "import sgtm.data.b", "b": "from sgtm.data import a"}, "sgtm.data.a -> sgtm.data.b -> sgtm.data.a"),
        ({"a": "from sgtm.data.b import f", "b": "def f():\n    from sgtm.data.a import g"}, "sgtm.data.a"),
        ({"__init__": "from sgtm.data.a import f", "a": "from sgtm.data import f"}, "sgtm.data -> sgtm.data.a"),
        ({"a": "from sgtm.data.b import f", "b": "if TYPE_CHECKING:\n    from sgtm.data.a import g"}, None),
        ({"__init__": "from sgtm.data.a import f", "a": "from sgtm.data.b import f", "b": "f = 1"}, None),
    ],
)
def test_a_ring_of_files_is_printed(tmp_path, monkeypatch, capsys, files, ring):
    tree(tmp_path, monkeypatch, {f"sgtm/data/{name}.py": text for name, text in files.items()})
    assert rooms.main() == (ring is not None)
    *_, last = capsys.readouterr().out.splitlines()
    assert (last.startswith("ring of imports: ") and ring in last) if ring else "ring" not in last


def test_a_file_in_no_room_is_an_error():
    with pytest.raises(ValueError, match=r"sgtm\.helpers is in no room"):
        rooms.room_of("sgtm.helpers")


def reached(start: str) -> set[str]:
    """Packages and modules of ours that importing a module imports at once, itself among them."""
    modules = {rooms.module_of(path): path for path in rooms.sources()}
    names, waiting = {start}, [start]
    while waiting:
        path = modules.get(waiting.pop())
        for node in ast.parse(path.read_text("utf-8")).body if path else ():
            if isinstance(node, ast.ImportFrom):
                imported = {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
            elif isinstance(node, ast.Import):
                imported = {name.name for name in node.names}
            else:
                continue
            imported |= {name.rpartition(".")[0] for name in imported}
            new = {name for name in imported if name in modules or name.split(".")[0] not in ("sgtm", "sgtm_kernels")}
            waiting += new - names
            names |= new
    return {name.split(".")[0] for name in names} | names


@pytest.mark.parametrize(
    ("start", "heavy"),
    [
        ("sgtm", {"torch", "pydantic"}),
        ("sgtm.commands.main", {"torch", "pydantic", "deepspeed"}),
        ("sgtm.estimate.launch", {"torch", "deepspeed"}),
        ("sgtm.estimate.explain", {"deepspeed", "transformers", "matplotlib"}),
        ("sgtm.run.evaluate", {"deepspeed", "matplotlib"}),
        ("sgtm.hf.export", {"deepspeed", "matplotlib"}),
        ("sgtm.sweep.run", {"deepspeed", "matplotlib"}),
        ("sgtm.measure.models", {"torch", "pydantic"}),
        ("sgtm.integrations.range_adamw", {"deepspeed", "transformers", "pydantic"}),
    ],
)
def test_what_takes_seconds_is_imported_where_it_is_used(start, heavy):
    assert not reached(start) & heavy


def test_what_is_imported_at_once_is_found():
    assert {"deepspeed", "torch", "sgtm.config.schema", "pydantic"} <= reached("sgtm.training.loop")


def without_tests(root: Path) -> list[str]:
    """Modules of `sgtm` that no test file has both in its name and in its text.

    In its name: `test_<module>.py` or `test_<folder>_<module>.py`, or that with more words behind it, anywhere in
    tests/. In its text: the file imports the module or names it or its file; of a command also `main(["<command>"`.
    """
    tests = {path: path.read_text("utf-8") for path in sorted((root / "tests").rglob("test_*.py"))}
    missing = []
    for path in sorted((root / "sgtm").rglob("*.py")):
        file = path.relative_to(root)
        if path.stem in ("__init__", "__main__"):
            continue
        module = ".".join(file.with_suffix("").parts)
        named = rf"\b({re.escape(module)}|{re.escape(file.as_posix())})\b"
        if path.parent.name == "commands":
            named += rf"|\bmain\(\[\"{path.stem}\""
        by_name = rf"test_({path.parent.name}_)?{path.stem}(_\w+)?"
        if not any(
            re.search(named, text) or any(f"{name}.".startswith(f"{module}.") for _, name in rooms.imports(test))
            for test, text in tests.items()
            if re.fullmatch(by_name, test.stem)
        ):
            missing.append(file.as_posix())
    return missing


def test_every_module_has_its_test_file():
    assert without_tests(rooms.ROOT) == []


@pytest.mark.parametrize(
    ("name", "text", "missing"),
    [
        ("test_loader", "from sgtm.data.loader import Loader", False),
        ("test_loader", "from sgtm.data import loader", False),
        ("test_data_loader", "import sgtm.data.loader", False),
        ("test_loader_epochs", "run('sgtm.data.loader')", False),
        ("test_loader", '"""Of sgtm/data/loader.py."""', False),
        ("test_loader", "from sgtm.data.store import Corpus", True),
        ("test_loader", "import sgtm.data.loaders", True),
        ("test_hf_loader", "from sgtm.data.loader import Loader", True),
        ("test_loaders", "from sgtm.data.loader import Loader", True),
    ],
)
def test_a_test_of_something_else_does_not_count(tmp_path, name, text, missing):
    for file, content in {"sgtm/data/loader.py": "", f"tests/{name}.py": text}.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(content)
    assert without_tests(tmp_path) == ["sgtm/data/loader.py"] * missing
