"""Find the text backbone of a model: its stacks, attention modules, positions, embeddings and heads."""
