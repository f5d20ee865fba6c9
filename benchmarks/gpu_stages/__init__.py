"""The stages of benchmarks/gpu.py: each a script that appends its rows to a file, and the driver that runs them."""
