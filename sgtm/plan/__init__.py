"""What a run will need, from its config alone: memory, traffic and speed, before anything is allocated."""
