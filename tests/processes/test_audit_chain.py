"""The chain that an audit prints is checked by sha256sum, a tool that is not ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from audited import evaluated_run

from sgtm.audit.audit import COSTLY, audit_export
from sgtm.audit.report import chain_text
from sgtm.hf.export import export_run


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sha256sum_checks_the_chain(tmp_path):
    run = evaluated_run(tmp_path, "llama")
    folder = export_run(run, ["es"], tmp_path / "safe")
    chain = chain_text(audit_export(folder, run, skip=COSTLY))
    assert checked(chain, tmp_path).returncode == 0
    with (folder / "config.json").open("ab") as file:
        file.write(b" ")
    done = checked(chain, tmp_path)
    assert done.returncode == 1 and f"{folder}/config.json: FAILED" in done.stdout


def checked(chain: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sha256sum", "-c", "-"], input=chain, capture_output=True, text=True, cwd=folder, check=False
    )
