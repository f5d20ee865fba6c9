"""Hugging Face models, both ways: export of a run, and weights to start from."""
