"""Checks that `attach` makes by running the model with the prompt."""
