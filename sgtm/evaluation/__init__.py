"""Losses by category and removed set, gradient norms, learning curves."""
