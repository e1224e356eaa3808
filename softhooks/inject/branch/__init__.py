"""Gated attention over the prompt, added to the output of the model's attention."""
