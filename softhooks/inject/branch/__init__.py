"""A gated attention over the prompt, added to the output of attention."""
