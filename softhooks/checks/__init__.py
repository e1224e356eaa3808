"""The checks of `attach`; most of them run the model with the prompt."""
