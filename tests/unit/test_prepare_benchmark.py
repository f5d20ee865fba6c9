"""benchmarks/prepare.py: every case is prepared, and a growth above the limit fails."""

import pytest


@pytest.fixture
def script(benchmarks):
    import prepare

    return prepare


def test_every_case_is_prepared(script, monkeypatch):
    monkeypatch.setattr(script, "VOCABULARY", 257)
    for case in script.CASES:
        row = script.measure(case, 1)
        assert row["tokens"] > 10_000 and row["cpu_s"] > 0 and row["memory_mib"] > 50


@pytest.mark.parametrize(("power", "status"), [(1, 0), (2, 1)])
def test_a_growth_above_the_limit_fails(script, monkeypatch, capsys, power, status):
    def measured(case, size):
        return {"case": case, "size": size, "cpu_s": 0.5 * size**power, "memory_mib": 1, "tokens": 1}

    monkeypatch.setattr(script, "measured", measured)
    monkeypatch.setattr("sys.argv", ["prepare.py", "--case", "run"])
    assert script.main() == status
    assert f"{power}.00" in capsys.readouterr().out
