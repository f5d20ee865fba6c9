"""benchmarks/export_memory.py writes what report.py reads."""

from __future__ import annotations

import pytest

TINY = {"layers": 2, "hidden_size": 64, "heads": 4, "intermediate_size": 96}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_and_their_table(benchmarks, monkeypatch, tmp_path, dtype):
    import export_memory
    import report

    monkeypatch.setitem(export_memory.SHAPES, "tiny", TINY)
    row = export_memory.measured("tiny", dtype, tmp_path)
    assert not list(tmp_path.iterdir()), "run and export are deleted"
    # 5 % of 4 heads is one, of 96 neurons 5: embedding and head, attention, MLP, norms
    weights = 2 * 32000 * 64 + 2 * (4 * 48 * 64 + 3 * 91 * 64 + 2 * 64) + 64
    assert row["largest_file_mib"] * 2**20 == pytest.approx(weights * (4 if dtype == "fp32" else 2), rel=1e-3)
    assert row["parameters"] == pytest.approx(2 * 32000 * 64 + 2 * (4 * 64 * 64 + 3 * 96 * 64), rel=1e-3)
    assert 50 < row["imports_mib"] < row["anonymous_mib"] and row["files"] == 1
    assert f"| tiny (0.00 billion parameters) | {dtype} | 1 |" in report.exported([row])


def test_a_model_that_is_held_is_over_the_limit(benchmarks, monkeypatch):
    import export_memory

    row = {"anonymous_mib": 6_001.0, "largest_file_mib": 1_900.0}
    monkeypatch.setattr(export_memory, "measured", lambda *args: row)
    monkeypatch.setattr("sys.argv", ["export_memory.py", "--shapes", "7B"])
    assert export_memory.main() == 1
    row["anonymous_mib"] = 5_900.0
    assert export_memory.main() == 0
