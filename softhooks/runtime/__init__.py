"""The hooks on a model with prompts, and their state."""
