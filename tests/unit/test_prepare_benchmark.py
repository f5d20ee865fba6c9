"""benchmarks/prepare.py: every case is prepared, a growth above the limit fails, and the table has a row for each."""

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


def test_the_table_has_a_row_for_each_case_with_its_largest_growth(script, monkeypatch):
    import report

    def measured(case, size):
        memory = 300 + 7 * size + (size > 16)
        return {"case": case, "size": size, "cpu_s": 2.0 * size, "memory_mib": memory, "tokens": 1}

    monkeypatch.setattr(script, "measured", measured)
    rows = list(script.rows(list(script.CASES), 64))
    rows[2]["growth"] = 1.2
    lines = report.prepared(rows).splitlines()
    assert "| one line of JSON | 1, 4, 16, 64 MiB | 2.0, 8.0, 32.0, 128.0 | 1.20 | 307, 328, 412, 749 | 7.0 |" in lines
    assert "| short documents in a file | 10 thousand | 20.0 |  | 370 |  |" in lines
    assert set(report.INPUTS) == set(script.CASES) and len(lines) == 6 + len(script.CASES)
