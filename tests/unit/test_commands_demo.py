"""`sgtm demo`: what it serves, and mistakes before anything is loaded."""

from __future__ import annotations

import pytest
from text_models import byte_run

from sgtm.commands.main import main
from sgtm.demo import server


@pytest.fixture
def served(monkeypatch):
    calls: list = []
    monkeypatch.setattr(server, "serve", lambda *arguments: calls.append(arguments))
    return calls


def test_the_loopback_interface_is_the_default(served, tmp_path):
    run = byte_run(tmp_path)
    assert main(["demo", str(run)]) == 0
    assert main(["demo", str(run), "--host", "0.0.0.0", "--port", "0", "--data.path", str(tmp_path / "corpus")]) == 0
    assert [rest for _, *rest in served] == [["127.0.0.1", 8420], ["0.0.0.0", 0]]
    assert [(source.path, source.data) for source, *_ in served] == [(run, None), (run, str(tmp_path / "corpus"))]


def test_mistakes(served, tmp_path, capsys):
    assert main(["demo", str(tmp_path / "none")]) == 2
    assert "not a run directory" in capsys.readouterr().err
    for port in ("-1", "65536", "http"):
        with pytest.raises(SystemExit):
            main(["demo", str(tmp_path), f"--port={port}"])
        assert f"--port: expected a port, 0 to 65535, got '{port}'" in capsys.readouterr().err
    assert not served
