"""The demo on an encoder: a classifier with a new head. `train.py` is a template for your own training code."""
