"""What the Triton kernels share: tiles, strips, block sizes, and launches to compile ahead of time."""
