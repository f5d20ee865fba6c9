"""Tools for developers: the ahead-of-time suite, tuning and timing. Nothing here runs in training."""
