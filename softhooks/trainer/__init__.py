"""Training with an unmodified `Trainer`: `callback.py` handles its events, and each other file covers one part of a run."""
