"""What the Triton kernels share: tiles, sums over strips, block sizes, and the variants to compile ahead of time."""
