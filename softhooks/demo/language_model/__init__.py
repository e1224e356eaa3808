"""The demo on a language model: an instruct model answers a question. `train.py` is the training code, meant to be copied."""
