"""One callback in an unmodified `Trainer`: `callback.py` says when, and each other file does one thing of what a run needs."""
