"""Compute embeddings of a prompt and a text, for inference servers."""
