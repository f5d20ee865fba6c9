"""The project's targets for the time of a step, by the model's name."""

from __future__ import annotations

from sgtm.measure.rows import Target

# CPU time, because wall time on a busy machine is unreliable. A pure forget step with joint
# parameters free has 91 % of the unmasked matmul work at the 18M shape.
CPU = {
    "tinystories-18m": {
        "nothing masked": Target("cpu_ratio", 1.01),
        "25 % forget sequences": Target("cpu_ratio", 1.00),
        "pure forget": Target("cpu_ratio", 0.93),
        "pure forget, joint masked": Target("cpu_ratio", 0.80),
    }
}
PEER = {"tinystories-18m": Target("ratio", 1.8, at_least=True)}  # of Hugging Face's time for a token to ours
GPU = {percent: Target("ratio", bound) for percent, bound in {0: 1.00, 5: 1.00, 25: 0.96, 100: 0.80}.items()}
# Unmasked, on one H100.
SPEEDS = {
    name: Target("tokens_per_second", speed, at_least=True)
    for name, speed in {"124m": 460_000, "254m": 290_000, "llama-1b": 50_000}.items()
}
