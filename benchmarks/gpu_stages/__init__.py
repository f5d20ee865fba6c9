"""The stages of benchmarks/gpu.py: each a script that appends its rows to a file, and the driver that runs them.

By hand: `PYTHONPATH=benchmarks:kernels:. python benchmarks/gpu_stages/smoke.py ROWS ...`
"""
