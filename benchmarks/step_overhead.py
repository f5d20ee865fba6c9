"""What masking costs: step times against the unmasked step of the same code, and against Hugging Face's GPT-Neo.

    python benchmarks/step_overhead.py [--preset tinystories-18m] [--sequences 4] [--rounds 15] [--json FILE]

The rows of `sgtm bench` (sgtm/bench.py) on one micro-batch, and in the same rounds those of Hugging Face, which runs in
processes of its own (hugging_face.py): their `ratio` is our unmasked tokens/s over theirs. The project's target stands
beside what was measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from environment import write_rows
from hugging_face import Peer

from sgtm.bench import Way, masked_steps, measure, print_rows, setting
from sgtm.config import Config, load_config
from sgtm.distributed.process_group import init_distributed

FOREIGN = "Hugging Face eager"
# Of the ratio. A pure forget step with joint parameters free has 91 % of the unmasked matmul work at the 18M shape.
TARGETS = {
    "nothing masked": "<= 1.02",
    "25 % forget sequences": "<= 1.00",
    "pure forget": "<= 0.85",
    "pure forget, joint masked": "<= 0.85",
    "Hugging Face eager, bf16 autocast": ">= 3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tinystories-18m")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of a step, one micro-batch (default 4)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = one_micro_batch(args.preset, args.sequences)
    init_distributed(config)
    rows = [with_target(row, config) for row in measure(masked_steps(config) | peers(config), config, args.rounds)]
    print_rows(rows)
    if args.json:
        write_rows(args.json, rows)


def one_micro_batch(preset: str, sequences: int) -> Config:
    config = load_config(preset, [])
    tokens = sequences * config.model.context
    return load_config(preset, [f"--train.tokens_per_step={tokens}", f"--train.micro_batch={sequences}"])


def peers(config: Config) -> dict[str, Way]:
    ways = {}
    for precision in ("bf16 autocast", "bf16 weights"):
        ways[f"{FOREIGN}, {precision}"] = Peer(config, precision)
        if not torch.cuda.is_available():
            ways[f"{FOREIGN}, {precision}, freed memory kept"] = Peer(config, precision, "kept")
    return ways


def with_target(row: dict, config: Config) -> dict:
    foreign = {"ratio_of": "our unmasked tokens/s, to its"} if row["row"].startswith(FOREIGN) else {}
    return row | foreign | {"target": TARGETS.get(row["row"]), "setting": setting(config)}


if __name__ == "__main__":
    main()
