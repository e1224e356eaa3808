"""What a model is made of: its text stack, attention modules, positions and heads."""
