"""The table of whole training steps in the reports: rows of `sgtm bench` and of steps.py (sgtm/measure/rows.py)."""

from __future__ import annotations

from collections.abc import Sequence

from tables import markdown, spread

PLAIN = "plain PyTorch"


def steps(rows: Sequence[dict], title: str = "What a masked step costs") -> str:
    """Steps relative to the unmasked one in time, CPU time and memory; columns that no row has are left out."""
    taken = [row for row in rows if "error" not in row]
    plain = {row.get("shape"): row["tokens_per_second"] for row in taken if row["row"] == PLAIN}
    header = ["shape", "backend", "step", "tokens/s", "time p20 / p50 / p80", "CPU time", "target", "to plain", "MFU",
              "of data sheet", "peak MiB", "memory"]  # fmt: skip
    columns = list(zip(header, *(_cells(row, plain) for row in taken), strict=True))
    table = list(zip(*(column for column in columns if any(column[1:])), strict=True))
    text = f"### {title}\n\n{_about(taken, bool(plain))}\n\n{markdown([list(row) for row in table])}"
    failed = [f"{_name(row)}: {row['error']}" for row in rows if "error" in row]
    return text + (f"\n\nNot measured: {'; '.join(failed)}." if failed else "")


def _name(row: dict) -> str:
    return ", ".join(filter(None, (row.get("shape"), row.get("backend"), row["row"])))


def _cells(row: dict, plain: dict) -> list[str]:
    target = f"{row['target']}{', MISSED' if row['missed'] else ''}" if row["target"] else ""
    shares = [f"{row[key]:.1%}" if key in row else "" for key in ("flops_utilisation", "datasheet_utilisation")]
    to_plain = plain.get(row.get("shape"), 0) / row["tokens_per_second"]
    return [
        row.get("shape", ""),
        row.get("backend", ""),
        row["row"] + "*" * bool(row.get("mean_of")) + (f" ({row['attention']})" if "attention" in row else ""),
        f"{row['tokens_per_second']:,.0f}",
        spread(row["ratio"]) if "ratio" in row else "1",
        f"{row['cpu_ratio']['p50']:.3f}" if "cpu_ratio" in row else "1",
        target,
        f"{to_plain:.3f}" if to_plain else "",
        *shares,
        f"{row['peak_mib']:,.0f}",
        f"{row['memory_ratio']:.3f}" if row.get("memory_ratio") else "",
    ]


def _about(rows: Sequence[dict], plain: bool) -> str:
    first = rows[0]
    rounds = " or ".join(map(str, sorted({row["rounds"] for row in rows})))
    text = [
        f"Forward, backward and AdamW, {rounds} interleaved rounds; {first.get('setting') or first['dtype']}. Time and "
        "CPU time (user and system, of the process) are those for a token, to the unmasked step in the same round; "
        "tokens/s are those of the unmasked step over that ratio of times."
    ]
    if plain:
        text.append(
            "Steps that mask micro-batches or documents are compared with the unmasked step on the same ones. To "
            f"plain: time for a token to that of {PLAIN}, compiled on a GPU. MFU: of the rate of a big matmul in the "
            "same rounds. * mean of several steps."
        )
    if any("attention" in row for row in rows):
        text.append(
            "Hugging Face's model trains in a process of its own, with the attention that transformers has for it, and "
            "on a CPU with freed memory kept, as ours does."
        )
    return " ".join(text)
