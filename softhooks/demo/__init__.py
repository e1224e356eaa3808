"""`softhooks demo`: train, save, load and compare prompts on real text.

`run` is the whole demo. `train` is its training script, written to be copied; `corpus` and `data` prepare the text, `models`
loads the model, `baselines` trains what the prompts are compared with, and `report` prints the results.
"""
