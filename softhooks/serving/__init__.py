"""Compute the input embeddings of a prompt and a text, for inference servers."""
