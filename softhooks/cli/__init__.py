"""The command `softhooks`: `cli.py` lists what there is; `softhooks run` has its options, its request and its help here."""
