"""Training with an unmodified `Trainer`: `callback.py` handles its events, each other file one part of a run."""
