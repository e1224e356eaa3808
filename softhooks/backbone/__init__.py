"""The text backbone of a model: find its stacks, attention modules, positions, embeddings and heads."""
