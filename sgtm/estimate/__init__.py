"""What a run will need and do, from its config alone: memory, traffic, speed, who updates what; how to start it."""
