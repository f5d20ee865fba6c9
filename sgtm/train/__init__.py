"""Training: the step, the loop, the optimizer, the schedule and the checkpoints."""
