"""What a domain's own embedding and head cost in a training step, `full` and of low rank.

    python benchmarks/domain_embedding.py [--preset tinystories-18m] [--rank 64] [--rounds 15] [--json FILE]

Forward, backward and AdamW through the engine, a quarter of the sequences forget, the others unlabeled, so that the
domain's part runs and learns on every token. Every round takes a step of each kind in turn. On two cores,
`OMP_NUM_THREADS=1` gives the steadier figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arguments import positive
from environment import write_rows

from sgtm.config import load_config
from sgtm.distributed.process_group import init_distributed
from sgtm.measure.bench import engine_steps, label_cases, setting
from sgtm.measure.rounds import take_rounds
from sgtm.measure.rows import Target, as_parent, row, table

TARGET = Target("cpu_ratio", 1.03)  # of the low-rank part
SIZE = ["--train.tokens_per_step", "2048", "--train.micro_batch", "4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tinystories-18m")
    parser.add_argument("--rank", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
    args = parser.parse_args()
    low = f"rank {args.rank}"
    parts = {"none": "none", low: str(args.rank), "full": "full"}
    configs = {
        name: load_config(args.preset, [*SIZE, "--masking.domain_embedding", value]) for name, value in parts.items()
    }
    init_distributed(configs["none"].distributed, configs["none"].kernels)
    steps = {}
    for name, config in configs.items():
        mixed = next((label, case) for label, case in label_cases(config, 1).items() if "forget sequences" in label)
        (steps[name],) = engine_steps(config, dict([mixed])).values()
    took = take_rounds(steps, args.rounds, warm_up=2)
    tokens = configs["none"].train.tokens_per_step
    base = took.sample("none", tokens)
    parent = as_parent(row("none", base, None), base)
    rows = [
        row(name, took.sample(name, tokens), None if name == "none" else parent, TARGET if name == low else None)
        | {"setting": setting(configs["none"])}
        for name in parts
    ]
    print(f"{setting(configs['none'])}: {args.rounds} rounds; relative to none\n\n{table(rows)}")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
