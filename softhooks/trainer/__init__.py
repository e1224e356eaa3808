"""Training with an unmodified `Trainer`: `callback.py` handles its events; every other file covers one part of a run."""
