"""Serve prompts: keys and values or embeddings for inference servers, and a store of the prompts of one base model."""
