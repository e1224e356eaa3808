"""`softhooks demo`: train, save, load and compare prompts on real text. `train.py` is the training code, meant to be copied."""
