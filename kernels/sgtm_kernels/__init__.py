"""Masked operations of Selective GradienT Masking: every op in a folder, its plain-PyTorch reference beside it."""
