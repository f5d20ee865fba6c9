"""Costs of a training step: `sgtm bench` (what masks cost) and `sgtm profile` (where the time goes).

`sgtm bench` (bench.py) takes the steps of one config through the engine (engine.py) and, with --peers, those of Hugging
Face's model (peer.py). benchmarks/steps.py takes those of every mixing mode in a bare loop (bare.py, mixings.py) and
compares them with the plain model (plain.py), on a machine with only torch, Triton and numpy. Both time their steps
with rounds.py and write rows as rows.py defines them.
"""
