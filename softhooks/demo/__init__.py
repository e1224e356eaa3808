"""`softhooks demo`: train, save, load and compare prompts on real text.

`run` runs the whole demo. `train` is the training script, written to be copied; `corpus` and `data` prepare the text, `models`
loads the model, `baselines` computes the baselines of the comparison, and `report` prints the results.
"""
