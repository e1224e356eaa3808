"""The demo on an encoder: a classifier with a new head. `train.py` is the training code, meant to be copied."""
