"""Selective GradienT Masking: distributed pretraining in which what is learnt from labelled data can be removed."""

__version__ = "0.1.0"
