"""Using the models of runs and of exported folders: completions, and the losses of any text."""
