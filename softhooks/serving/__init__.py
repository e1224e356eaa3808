"""Prompts as embedding rows, for inference servers."""
