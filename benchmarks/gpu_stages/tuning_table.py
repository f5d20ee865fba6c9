"""Stage `tune`: the candidates of every tunable, timed; the table is written after every choice.

    tuning_table.py ROWS --table FILE [--cpu] [--only attention,mlp] [--shape 254m] [--seconds S]

A row is a choice. Choices already in the table are not measured again. `sgtm` reads the table from SGTM_TUNED=FILE, or
from kernels/sgtm_kernels/tuned/. On a CPU the tuner runs in Triton's interpreter, in fp32, with the MLP's candidates.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from device import healthy
from journal import Items, Journal

from sgtm_kernels.mlp.kernel import TILES
from sgtm_kernels.tools.tune import CASES, Decision, tune
from sgtm_kernels.triton_common.tuning import Choice, written

import torch  # isort: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default="attention,cross_entropy,mlp,linear")
    parser.add_argument("--shape", default="254m,llama-1b,124m")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a choice")
    args = parser.parse_args()
    journal = Journal(args.rows)
    items = Items(journal, healthy)
    if args.cpu:
        candidates_in_fp32()

    def decided(choice: Choice, result: Decision) -> None:
        times = {"microseconds": result.p50 * 1e6, "heuristic_microseconds": result.heuristic_p50 * 1e6}
        rounded = {name: round(value, 2) for name, value in times.items()}
        journal.add({"choice": choice[0], "key": written(choice[1]), "config": result.config._asdict(), **rounded})

    def every_choice(op: str, shape: str) -> list[dict]:
        options = {"device": torch.device("cpu"), "dtype": torch.float32, "rounds": 3} if args.cpu else {}
        commit = journal.shared.get("commit")
        tune([op], [shape], args.table, commit, seconds=args.seconds, resume=True, decided=decided, **options)
        return [{"op": op, "shape": shape, "table": args.table.name}]

    for shape in args.shape.split(","):
        for op in args.only.split(","):
            if op in CASES:
                items.measure(f"{op}, {shape}", lambda op=op, shape=shape: every_choice(op, shape))
    return 0


def candidates_in_fp32() -> None:
    """The interpreter is wrong in bf16, and only bf16 has candidates besides the heuristic."""
    for tunable in TILES.values():
        for (dtype, *rest), configs in list(tunable.others.items()):
            if dtype == "bf16":
                tunable.others[("fp32", *rest)] = configs


if __name__ == "__main__":
    sys.exit(main())
