"""The config of a preset cut down to one micro-batch, and what the scripts that time it are asked."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sgtm.config import Config, load_config
from sgtm.distributed.process_group import init_distributed


def asked(about: str, rounds: int) -> tuple[argparse.Namespace, Config]:
    """The arguments (preset, sequences, rounds, threads, json), and the config; the process group is up."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--preset", default="tinystories-18m")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of a step, one micro-batch (default 4)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"(default {rounds})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = one_micro_batch(args.preset, args.sequences)
    init_distributed(config)
    return args, config


def one_micro_batch(preset: str, sequences: int) -> Config:
    tokens = sequences * load_config(preset, []).model.context
    return load_config(preset, [f"--train.tokens_per_step={tokens}", f"--train.micro_batch={sequences}"])
