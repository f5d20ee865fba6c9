"""The record of an adapted run."""

RECORD = {
    "domain": "es",
    "options": {"rank": 16, "alpha": 32.0, "retain_weight": 1.0},
    "steps": 125,
    "lr": 1 / 150,
    "seed": 3,
    "seen": False,
    "source": {"run": "filtered", "checkpoint": "step_00002000", "step": 2000},
}
