"""No room imports from one listed below it (see tests/rooms.py), and modules have test files by name."""

import ast
from pathlib import Path

import pytest
import rooms


def test_imports_go_downward(capsys):
    assert rooms.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize("line", ["from sgtm.training.step import train_step", "    import sgtm.training.loop"])
def test_an_upward_import_is_found(tmp_path, monkeypatch, capsys, line):
    (tmp_path / "sgtm" / "data").mkdir(parents=True)
    (tmp_path / "sgtm" / "data" / "loader.py").write_text(f"def load():\n{line}\n" if line[0] == " " else f"{line}\n")
    monkeypatch.setattr(rooms, "ROOT", tmp_path)
    assert rooms.main() == 1
    assert "sgtm/data/loader.py imports sgtm.training." in capsys.readouterr().out


def test_type_checkers_may_look_up(tmp_path):
    file: Path = tmp_path / "a.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from sgtm.training.step import train_step\nfrom sgtm.config import Config\n"
    )
    assert list(rooms.imported(file)) == ["sgtm.config"]


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
    ],
)
def test_what_takes_seconds_is_imported_where_it_is_used(start, heavy):
    assert not reached(start) & heavy


def test_what_is_imported_at_once_is_found():
    assert {"deepspeed", "torch", "sgtm.config.schema", "pydantic"} <= reached("sgtm.training.loop")


def test_every_module_has_its_test_file_by_name():
    """`test_<module>.py` or `test_<folder>_<module>.py`, anywhere in tests/."""
    tests = {path.name for path in (rooms.ROOT / "tests").rglob("test_*.py")}
    modules = [path.relative_to(rooms.ROOT) for path in rooms.sources()]
    missing = [
        str(module)
        for module in modules
        if module.parts[0] == "sgtm" and module.stem not in ("__init__", "__main__")
        if not {f"test_{module.stem}.py", f"test_{module.parent.name}_{module.stem}.py"} & tests
    ]
    assert missing == []
