"""Training: the step, the loop and the schedule."""
