"""What the Triton kernels share: tiles, strips, scaling, block sizes, and launches to compile ahead of time."""
