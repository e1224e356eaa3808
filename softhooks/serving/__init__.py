"""A prompt and a text as embeddings, for inference servers."""
