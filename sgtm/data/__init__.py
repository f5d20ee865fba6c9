"""Labelled text on disk, and batches of it."""
