"""`sgtm doctor` finds what is there, says what is missing, and survives what is broken."""

import json
import sys

import pytest
import torch

from sgtm.commands.main import main
from sgtm.measure.doctor import findings, print_findings
from sgtm_kernels.dispatch import BACKENDS, FALLBACK, OPS
from sgtm_kernels.measurement import driver
from sgtm_kernels.triton_common.tuning import table_of


def test_json_holds_every_section(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    print_findings(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["software"]["torch"] == torch.__version__
    assert set(report["backends"]) == set(OPS)
    assert report["environment"]["NCCL_DEBUG"] == "INFO"
    assert ("GPU" in report["missing"]) == (not torch.cuda.is_available()) == (not report["gpus"])


def test_text_is_plain_and_complete(capsys):
    print_findings()
    out = capsys.readouterr().out
    assert "\033" not in out
    for section in (
        "software:",
        "cpu:",
        "memory:",
        "gpus:",
        "backends:",
        "dispatch:",
        "tuning:",
        "environment:",
        "missing (and what for):",
    ):
        assert f"\n{section}\n" in f"\n{out}"


def test_absent_package_is_missing_with_its_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "sgtm_kernels.norm.pytorch", None)  # importing it raises
    monkeypatch.setattr("sgtm.measure.doctor.installed", lambda name: None if name == "triton" else "1.0")
    report = findings()
    assert report["software"]["triton"] == "not installed"
    assert "Triton kernels" in report["missing"]["triton"]
    assert "wandb" not in report["missing"]
    assert "torch (auto) broken: " in report["backends"]["norm"]
    assert "broken" not in report["backends"]["mlp"]


def test_backends_mark_the_default_and_report_a_wrong_choice(monkeypatch):
    monkeypatch.delenv("SGTM_KERNELS", raising=False)
    assert findings()["backends"]["mlp"] == ", ".join(f"{b} (auto)" if b == FALLBACK else b for b in BACKENDS)
    monkeypatch.setenv("SGTM_KERNELS", "nonsense")
    assert "nonsense" in findings()["backends"]["auto"]


def test_dispatch_names_the_backend_of_auto_and_why(monkeypatch):
    """Triton's interpreter makes its backend usable here."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch = findings()["dispatch"]
    assert dispatch["auto"] == "torch for every op: the default on a CPU"
    assert dispatch["torch, attention"].startswith("SDPA; windows and documents on a GPU by flash_attn")
    monkeypatch.setenv("SGTM_KERNELS", "reference")
    monkeypatch.setenv("SGTM_LINEAR", "rectangles")
    report = findings()
    assert report["dispatch"]["auto"] == "reference for every op: named by SGTM_KERNELS"
    assert report["dispatch"]["triton, linear"].endswith("token to token: rectangles (SGTM_LINEAR)")
    assert report["environment"]["SGTM_LINEAR"] == "rectangles"
    monkeypatch.setenv("SGTM_ATTENTION", "flex")
    report = findings()
    assert report["dispatch"]["torch, attention"] == "flex (SGTM_ATTENTION)"
    assert report["environment"]["SGTM_ATTENTION"] == "flex"
    for variable, row in (("SGTM_ATTENTION", "torch, attention"), ("SGTM_LINEAR", "triton, linear")):
        before = dict(report["dispatch"])
        with monkeypatch.context() as wrong:
            wrong.setenv(variable, "flexible")
            now = findings()["dispatch"]
        assert now.pop(row).startswith(f"broken: {variable} is 'flexible'")
        before.pop(row)
        assert now == before


def test_why_triton_is_unusable_is_said_once(monkeypatch):
    monkeypatch.setattr(
        "sgtm_kernels.dispatch.unusable", lambda name, dtype=None: "it is away" if name == "triton" else None
    )
    backends = findings()["backends"]
    assert all(backends[op].endswith("triton unusable") for op in OPS)
    assert backends["triton is unusable"] == "it is away" and str(backends).count("it is away") == 1


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 570.1; echo 570.1", "570.1"),
        ("echo 'NVIDIA-SMI has failed because'; exit 9", None),
        ("exec sleep 3000", None),
        ("true", None),
        (None, None),
    ],
)
def test_the_driver_is_one_version_or_none(script, expected, monkeypatch, tmp_path):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    monkeypatch.setattr("sgtm_kernels.measurement.PATIENCE", 1)
    assert driver() == expected


def test_the_table_of_tuned_kernels_is_told(monkeypatch, tmp_path):
    path = tmp_path / "t.json"
    table_of.cache_clear()
    monkeypatch.delenv("SGTM_LINEAR", raising=False)
    for value, content, expected in (
        ("off", None, "heuristics, no table"),
        (str(path), None, f"broken: no table of kernel configurations: {path}"),
        (str(path), '{"device": "T0", "entries": {"a": {"k": {"config": {}}}}}', f"{path}, 1 entry"),
    ):
        if content:
            path.write_text(content)
        monkeypatch.setenv("SGTM_TUNED", value)
        table_of.cache_clear()
        tuning = findings()["tuning"]
        assert next(iter(tuning.values())).startswith(expected)
    table_of.cache_clear()


def test_the_self_check_is_a_section_and_the_exit_status(capsys, monkeypatch):
    from sgtm.config import load_config
    from sgtm_kernels.dispatch import pick

    config = load_config("debug", [])
    assert print_findings(check=config) == 0
    section = capsys.readouterr().out.partition("self-check:\n")[2].splitlines()
    assert section[0].split(maxsplit=1) == ["config", "debug, backend torch, fp32"]
    assert {line.split()[0] for line in section[1:8]} == set(OPS) and all("passed" in line for line in section[1:8])
    norm = pick("norm", "torch")
    inner = norm.layer_norm
    monkeypatch.setattr(norm, "layer_norm", lambda *arguments: 1.1 * inner(*arguments))
    assert print_findings(as_json=True, check=config) == 1
    verdicts = json.loads(capsys.readouterr().out)["self-check"]
    assert verdicts.pop("norm").startswith("norm.layer_norm: output 0 is off by")
    assert {verdict for op, verdict in verdicts.items() if op != "config"} == {"passed"}


def test_the_command_checks_a_config_with_its_overrides(capsys):
    assert main(["doctor", "--check", "debug", "--train.precision", "bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["self-check"]["config"] == "debug, backend torch, bf16"
    assert main(["doctor", "--train.precision", "bf16"]) == 2
    assert "--train.precision is a key of a config, which only --check takes" in capsys.readouterr().err
