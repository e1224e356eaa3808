"""Prompts as embeddings, for inference servers."""
