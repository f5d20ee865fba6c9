"""No room imports from one listed below it; see tests/rooms.py."""

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
