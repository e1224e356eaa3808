"""The demo on a language model: an instruct model answers a question. `train.py` is a template for your own."""
