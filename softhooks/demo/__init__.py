"""`softhooks demo`: the whole job on real text, as a plain Hugging Face Trainer script.

`corpus` reads the text, `train` is the script (copy its Trainer lines), `baselines` is what the results are compared
with, `report` prints the table, `run` puts them in order. Importing this package imports none of them.
"""
